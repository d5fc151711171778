"""From options to objects: model, criterion, and the state that training changes."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import engine
import losses
import models
import teachers
import utils
from architectures.dynamic_size import keywords_for_other_sizes, take_other_sizes
from architectures.hub import built_by
from architectures.memory_format import to_channels_last, wants_channels_last
from architectures.summary import ModelSummary
from architectures.talking_heads import Choice, set_path
from architectures.variant import Variant
from architectures.weights import PartialWeightsError, load_pretrained_weights
from augmentation.mixing import Mixer
from augmentation.preprocessing import Preprocessing, per_channel
from cait_models import Attention_talking_head
from checkpointing.files import weights_of
from checkpointing.variants import variant_of
from config import CHECKPOINT, DEFAULT, MODEL, Config, is_multilabel
from distributed.batch_norm import synchronise_batch_norm
from distributed.processes import Processes
from distributed.wrapping import replicate, shard
from errors import CheckpointError, OptionError
from inference import read_content
from optimization.ema import ModelEma
from optimization.freezing import Freezer
from optimization.groups import classifier_parameters
from optimization.lora import add_adapters
from optimization.optimizer import build_optimizer, scaled_lr
from optimization.schedule import build_schedule
from optimization.state import Progress, TrainState
from outputs.files import Outputs
from pipeline.sources.registry import default_normalization
from training.class_weights import announce_weights, class_weights
from training.data import Data
from training.image_options import evaluation_crop_ratio
from training.peaks import device_peak
from training.positive_weights import announce_positive_weights, positive_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a run trains, and with what."""

    config: Config
    processes: Processes
    device: torch.device
    data: Data
    preprocessing: Preprocessing
    summary: ModelSummary
    criterion: nn.Module
    state: TrainState
    freezer: Freezer
    mixer: Mixer | None
    settings: engine.StepSettings
    outputs: Outputs = field(default_factory=Outputs)
    hub_config: dict[str, Any] | None = None
    """Of a model from one of timm's sources: ``architectures.hub.description``."""
    summaries: dict[tuple[int, int], ModelSummary] = field(default_factory=dict)
    """The model's by the size of its images, of all that it is to see."""

    @property
    def mixer_now(self) -> Mixer | None:
        """What mixes the epoch under way; None where nothing is mixed, or no longer."""
        return self.mixer and self.mixer.in_epoch(self.state.progress.epoch)


def _channels_last(config: Config, model: nn.Module) -> bool:
    asked = False if config.dist.fsdp else config.model.channels_last
    return wants_channels_last(model, asked)


def build_model(
    config: Config,
    num_classes: int,
    device: torch.device,
    resumed: dict[str, Any] | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """The model on its device, with its starting weights, and the preprocessing it is to have.

    A run that is ``resumed`` from a checkpoint needs no other weights to start from.
    """
    options = config.model
    with built_by(options.model, (resumed or {}).get("hub_config")):
        model = models.build_model(
            options.model,
            num_classes,
            input_size=options.input_size,
            in_chans=options.in_chans,
            drop=options.drop,
            drop_path=options.drop_path,
            drop_block=options.drop_block,
            pretrained=options.pretrained and resumed is None,
            grad_checkpointing=options.grad_checkpointing,
            required=config.explicit(),
            variant=_variant(config, num_classes),
        )
    if options.train_sizes:
        take_other_sizes(model)
    choose_talking_heads(model, options.talking_heads)
    if options.finetune and resumed is None:
        _start_from(model, options.finetune, options.allow_partial, evaluate=config.run.eval)
    if not config.run.eval:
        _prepare_training(config, model, resumed is None)
    if config.dist.sync_bn and dist.is_initialized() and not config.run.eval:
        model = synchronise_batch_norm(model, device)
    if not config.dist.fsdp or config.run.eval:
        # A model that is to be sharded may be too large for one device.
        model.to(device)
    if _channels_last(config, model):
        to_channels_last(model)
    return model, _preprocessing(config, model, resumed or {})


def _variant(config: Config, num_classes: int) -> Variant:
    """The form that is asked for, able to take images of other sizes where ``--train-sizes`` has
    them."""
    variant, options = variant_of(config.flat()), config.model
    if not options.train_sizes or config.run.eval:
        return variant
    more = keywords_for_other_sizes(models.resolve_name(options.model), num_classes)
    return dataclasses.replace(variant, arguments={**more, **variant.arguments})


def _prepare_training(config: Config, model: nn.Module, new: bool) -> None:
    """What ``--head-init-scale`` and ``--lora`` change in a model that has its weights."""
    scale = config.model.head_init_scale
    if scale is not None and new:
        parameters = classifier_parameters(model)
        if not parameters:
            message = "the model has no classifier of its own: leave it out"
            raise OptionError("head_init_scale", message)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(scale)
    if config.model.lora:
        add_adapters(model, config.model)


def _start_from(model: nn.Module, source: str, allow_partial: bool, *, evaluate: bool) -> None:
    """``--finetune``: fill ``model`` from a checkpoint, and say with what.

    OptionError unless all is filled that has to be: to ``evaluate``, everything.
    """
    content = read_content(source)
    try:
        weights = weights_of(content)
        size = (content.get("preprocessing") or {}).get("input_size")
        report = load_pretrained_weights(model, weights, size=size)
    except PartialWeightsError as error:
        if evaluate or not allow_partial:
            hint = "" if evaluate else " (--allow-partial starts with what fits)"
            raise OptionError("finetune", f"{source}: {error}{hint}") from None
        log.warning("finetune %s: %s", source, error)
        report = load_pretrained_weights(model, weights, allow_partial=True, size=size)
    except CheckpointError as error:
        raise OptionError("finetune", f"{source}: {error}") from None
    log.info("finetune %s: %s", source, report.summary())
    if evaluate and (report.missing or report.skipped):
        raise OptionError(
            "finetune", "these weights don't fill the model, there is nothing to evaluate yet"
        )


def choose_talking_heads(model: nn.Module, choice: Choice) -> None:
    """Compute CaiT's attention as ``--talking-heads`` says. Raises OptionError without any."""
    if choice != "auto" and not any(isinstance(m, Attention_talking_head) for m in model.modules()):
        raise OptionError("talking_heads", "the model has no talking heads: leave it out")
    set_path(choice)


def _preprocessing(config: Config, model: nn.Module, resumed: dict[str, Any]) -> Preprocessing:
    """As asked for; normalisation else as the run began, of the data set, or of the model; the
    background else as the run began."""
    own = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    saved = resumed.get("preprocessing")
    background = config.data.background
    if saved is not None:
        mean, std = tuple(saved["mean"]), tuple(saved["std"])
        if config.origin["background"] in (DEFAULT, MODEL, CHECKPOINT):
            background = Preprocessing.from_dict(saved).background
    else:
        mean, std = default_normalization(config.data.data_set) or own
    return Preprocessing(
        input_size=config.model.input_size,
        crop_ratio=evaluation_crop_ratio(config),
        interpolation=config.data.interpolation,
        mean=per_channel(config.data.mean or mean, config.model.in_chans),
        std=per_channel(config.data.std or std, config.model.in_chans),
        crop_mode=config.data.crop_mode,
        background=background,
        bit_depth=config.data.bit_depth,
    )


def build_criterion(
    config: Config, data: Data, preprocessing: Preprocessing, device: torch.device
) -> nn.Module:
    """The loss of ``--loss``, class weights and distillation, on the device."""
    weight = class_weights(config.loss.class_weights, data.train)
    announce_weights(weight, data.class_names)
    positive = positive_weights(config.loss.pos_weight, data.train)
    announce_positive_weights(positive)
    teacher = teachers.build_teacher(
        config.loss,
        num_classes=len(data.class_names),
        preprocessing=preprocessing,
        class_names=data.class_names,
        task=config.data.task,
        other_sizes=bool(config.model.train_sizes),
    )
    criterion = losses.build_criterion(
        config.loss,
        num_classes=len(data.class_names),
        weight=weight,
        teacher=teacher,
        splits=config.augment.aug_splits,
        multilabel=is_multilabel(config),
        pos_weight=positive,
    )
    return criterion.to(device)


def build_state(
    config: Config,
    model: nn.Module,
    data: Data,
    processes: Processes,
    device: torch.device,
) -> tuple[TrainState, Freezer]:
    """Optimiser, schedule, scaler and moving average around ``model``."""
    if config.dist.fsdp and not processes.distributed:
        raise OptionError(
            "fsdp",
            "one process has nobody to share with: start with torchrun --nproc-per-node N, or "
            "leave it out",
        )
    amp = utils.amp_dtype(config.optim.amp, device)
    average = copy.deepcopy(model) if config.ema.model_ema else None
    if config.dist.fsdp:
        for module in filter(None, (model, average)):
            shard(module, device, amp)
    lr = scaled_lr(config.optim.lr, effective_batch(config, processes), config.optim.unscale_lr)
    # The optimiser gets all parameters, so it comes before any is frozen.
    optimizer = build_optimizer(model, config.optim, lr=lr, required=config.explicit())
    freezer = Freezer(
        model,
        attn_only=config.model.attn_only,
        freeze=config.model.freeze,
        unfreeze_at=config.model.unfreeze_at,
    )
    freezer.apply(0)
    updates = data.updates_per_epoch(config)
    schedule = build_schedule(
        config.schedule,
        lr=lr,
        epochs=config.run.epochs,
        updates_per_epoch=updates,
        lower_is_better=config.save.best_metric.endswith("loss"),
        seed=config.run.seed,
        required=config.explicit(),
    )
    state = TrainState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type) if amp == torch.float16 else None,
        ema=None if average is None else _moving_average(config, model, average),
        wrap=_wrapper(config, processes, device),
        progress=Progress(
            updates_per_epoch=updates,
            world_size=processes.world_size,
            batch_size=config.data.batch_size,
        ),
    )
    return state, freezer


def _moving_average(config: Config, model: nn.Module, average: nn.Module) -> ModelEma:
    return ModelEma(
        model,
        config.ema.model_ema_decay,
        warmup=config.ema.model_ema_warmup,
        device=torch.device("cpu") if config.ema.model_ema_force_cpu else None,
        average=average,
    )


def _wrapper(
    config: Config, processes: Processes, device: torch.device
) -> Callable[[nn.Module], nn.Module]:
    """What puts the model into DDP and ``torch.compile``."""

    def wrap(module: nn.Module) -> nn.Module:
        if processes.distributed and not config.dist.fsdp:
            # Freezing changes what takes part, but the model is wrapped anew then.
            module = replicate(module, device, static=config.optim.accum_steps == 1)
        return compiled(config, module)

    return wrap


def step_settings(
    config: Config,
    processes: Processes,
    device: torch.device,
    data: Data,
    model: nn.Module,
    macs: int = 0,
) -> engine.StepSettings:
    """How the engine is to make a step; ``data`` has its transforms, ``macs`` are the model's."""
    amp = utils.amp_dtype(config.optim.amp, device)
    return engine.StepSettings(
        device=device,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        rank=processes.rank,
        amp=amp,
        accum_steps=config.optim.accum_steps,
        clip_grad=config.optim.clip_grad,
        clip_mode=config.optim.clip_mode,
        train_mode=config.augment.train_mode,
        on_nonfinite=config.optim.on_nonfinite,
        log_interval=config.log.log_interval,
        channels_last=_channels_last(config, model),
        in_chans=config.model.in_chans,
        size=config.model.size,
        prepare=data.prepare,
        macs=macs * max(1, config.augment.aug_splits),
        peak=device_peak(device, amp),
    )


def compiled(config: Config, module: nn.Module) -> nn.Module:
    """``module``, compiled if ``--compile`` says so."""
    return torch.compile(module, mode=config.model.compile_mode) if config.model.compile else module


def effective_batch(config: Config, processes: Processes) -> int:
    """Images of one update: batch × processes × accumulated batches."""
    return config.data.batch_size * processes.world_size * config.optim.accum_steps


def total_epochs(config: Config) -> int:
    """Epochs of a run, the cool-down included."""
    return config.run.epochs + config.schedule.cooldown_epochs
