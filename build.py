"""From options to objects: data, model, criterion, and the state that training changes."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import cache
import checkpoint
import datasets
import engine
import losses
import models
import optim
import parallel
import talking_heads
import utils
from augment import EvalTransform, Preprocessing
from batch_augment import BatchAugment, Normalise, supports
from cait_models import Attention_talking_head
from config import Config
from errors import OptionError
from samplers import BalancedSampler, EpochSampler, EvalSampler, RASampler, ShuffleSampler
from state import ModelEma, Progress, TrainState

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The two sets, how they are ordered and loaded, and what they are called."""

    train: datasets.ImageDataset
    val: datasets.ImageDataset
    class_names: list[str]
    sampler: EpochSampler
    train_loader: datasets.Loader | cache.CachedLoader
    val_loader: datasets.Loader | cache.CachedLoader
    steps: int
    """Batches an epoch and process."""
    prepare: Normalise | BatchAugment | None = None
    """What makes the model's input of uint8 batches; set with the transforms."""

    def updates_per_epoch(self, config: Config) -> int:
        return math.ceil(self.steps / config.optim.accum_steps)

    def set_transforms(
        self, config: Config, preprocessing: Preprocessing, device: torch.device
    ) -> None:
        """Say how pictures become tensors, once the model's normalisation is known; fill caches."""
        centre = EvalTransform(preprocessing).crop
        self.val.transform = centre
        self.prepare = Normalise(preprocessing)
        if config.run.overfit_batches:
            self.train.transform = centre
        elif config.augment.augment_on == "cpu" or not supports(config.augment):
            self.train.transform = datasets.build_transform(True, preprocessing, config.augment)
        else:
            self.prepare = BatchAugment(preprocessing, config.augment, config.run.seed)
            self.train.transform = self.prepare
        main = not dist.is_initialized() or dist.get_rank() == 0
        for name in ("train_loader", "val_loader"):
            loader = cache.apply(
                config.data.cache, getattr(self, name), device=device, visible=main
            )
            setattr(self, name, loader)

    def describe(self, device: torch.device) -> str:
        """Where training pictures come from and are augmented."""
        loader = self.train_loader
        if isinstance(loader, cache.CachedLoader):
            images = loader.store.images
            source = f"{images.numel() / 2**20:.1f} MiB of pictures in memory of {images.device}"
        else:
            source = f"{loader.num_workers} loader processes"
            if isinstance(self.train.source, cache.MemorySource):
                source += f", {self.train.source.pixels.numel() / 2**20:.1f} MiB of pictures in ram"
        if isinstance(self.prepare, BatchAugment):
            return f"{source}; augmented by the batch on {device}"
        return f"{source}; augmented one by one on the host"

    def ways_to_feed_faster(self, config: Config) -> list[str]:
        """What to change where the device waits for pictures, the easiest first."""
        if isinstance(self.train_loader, cache.CachedLoader):
            return (
                ["--cache device"] if config.data.cache != "device" else ["a larger --batch-size"]
            )
        workers, cores = self.train_loader.num_workers, datasets.cores()
        ways = []
        if workers < cores:
            ways.append(f"--num-workers {cores} (now {workers}, the machine has {cores} cores)")
        if not isinstance(self.prepare, BatchAugment):
            ways.append("--augment-on device")
        if not isinstance(self.train.source, cache.MemorySource):
            ways.append("--cache ram, if the decoded pictures fit")
        ways.append("smaller files: python -m tools.data pack --short-side 256")
        return ways

    def batches(self, epoch: int, samples: int = 0) -> datasets.Loader | cache.CachedLoader:
        """The batches of ``epoch`` after the first ``samples`` pictures."""
        self.sampler.set_epoch(epoch, samples)
        return self.train_loader


def build_data(config: Config, processes: utils.Processes) -> Data:
    """Data sets, samplers and loaders of this process; transforms are set later."""
    options, augment, seed = config.data, config.augment, config.run.seed
    with utils.main_process_first(processes):
        train = datasets.build_dataset(True, options, None, seed=seed)
        val = datasets.build_dataset(False, options, None, seed=seed)
    world = {"num_replicas": processes.world_size, "rank": processes.rank}
    if config.run.overfit_batches:
        count = config.run.overfit_batches * options.batch_size * processes.world_size
        if count > len(train):
            raise OptionError(
                "overfit_batches", f"{count} pictures are more than the {len(train)} there are"
            )
        order = ShuffleSampler(len(train), seed=seed).order(0)[:count].tolist()
        train = val = train.subset(order)
    sampler: EpochSampler
    if options.sampler == "balanced":
        if train.targets is None:
            raise OptionError("sampler", "balanced needs the label of every picture beforehand, "
                              f"which {options.data_set} doesn't give: leave it out")  # fmt: skip
        sampler = BalancedSampler(train.targets, seed=seed, **world)
    elif augment.repeated_aug and not config.run.overfit_batches:
        sampler = RASampler(len(train), seed=seed, groups=train.source.groups, **world)
    else:
        sampler = ShuffleSampler(len(train), seed=seed, groups=train.source.groups, **world)
    train_loader = datasets.build_loader(
        train,
        sampler,
        batch_size=options.batch_size,
        drop_last=True,
        **_loading(config, processes),
    )
    if config.optim.accum_steps > len(train_loader):
        raise OptionError(
            "accum_steps", f"an epoch has only {len(train_loader)} batches to accumulate: lower it"
        )
    val_loader = build_val_loader(config, val, processes)
    return Data(
        train, val, list(train.classes), sampler, train_loader, val_loader, len(train_loader)
    )


def build_val_loader(
    config: Config, val: datasets.ImageDataset, processes: utils.Processes
) -> datasets.Loader:
    """This process's share of the validation set in order, or all of it with ``--no-dist-eval``."""
    shared = config.dist.dist_eval
    sampler = EvalSampler(
        len(val),
        num_replicas=processes.world_size if shared else 1,
        rank=processes.rank if shared else 0,
    )
    # At most the whole set: batches are filled up, and a process may have few pictures.
    batch_size = min(
        config.data.eval_batch_size or math.ceil(1.5 * config.data.batch_size), len(val)
    )
    return datasets.build_loader(
        val, sampler, batch_size=batch_size, drop_last=False, **_loading(config, processes)
    )


def _loading(config: Config, processes: utils.Processes) -> dict[str, Any]:
    workers = config.data.num_workers
    most = datasets.most_workers(
        config.data.batch_size * config.model.input_size**2 * _bytes_per_pixel(config),
        processes.local_world_size,
    )
    if workers == "auto":
        workers = datasets.auto_num_workers(processes.local_world_size)
        if most is not None and workers > most:
            log.warning("%d loader processes instead of %d: /dev/shm has no room for more; "
                        "in a container, see --shm-size", most, workers)  # fmt: skip
            workers = most
    elif most is not None and workers > most:
        raise OptionError("num_workers", f"/dev/shm has room for the batches of {most} loader "
                          f"processes, not of {workers}: lower it, or --batch-size, or give the "
                          "container --shm-size=8g")  # fmt: skip
    return {
        "num_workers": workers,
        "pin_memory": config.data.pin_mem and config.run.device != "cpu",
        "seed": config.run.seed,
        "timeout": config.data.loader_timeout,
    }


def _channels_last(config: Config, model: nn.Module) -> bool:
    asked = False if config.dist.fsdp else config.model.channels_last
    return models.wants_channels_last(model, asked)


def _bytes_per_pixel(config: Config) -> int:
    """Of a training picture on its way from a loader process."""
    as_floats = config.augment.augment_on == "cpu" or not supports(config.augment)
    return 3 * (4 if as_floats else 1)


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
    model = models.build_model(
        options.model,
        num_classes,
        input_size=options.input_size,
        drop=options.drop,
        drop_path=options.drop_path,
        drop_block=options.drop_block,
        pretrained=options.pretrained and resumed is None,
        grad_checkpointing=options.grad_checkpointing,
        required=config.explicit(),
    )
    choose_talking_heads(model, options.talking_heads)
    started_from = resumed or {}
    if options.finetune and resumed is None:
        started_from = checkpoint.load_file(options.finetune)
        report = models.load_pretrained_weights(model, checkpoint.weights_of(started_from))
        log.info("finetune %s: %s", options.finetune, report.summary())
        if config.run.eval and (report.missing or report.skipped):
            raise OptionError(
                "finetune", "these weights don't fill the model, there is nothing to evaluate yet"
            )
    if config.dist.sync_bn and dist.is_initialized() and not config.run.eval:
        model = parallel.synchronise_batch_norm(model, device)
    channels_last = _channels_last(config, model)
    layout = torch.channels_last if channels_last else torch.preserve_format
    if not config.dist.fsdp or config.run.eval:
        # A model that is to be sharded may be too large for one device.
        model.to(device, memory_format=layout)
    return model, _preprocessing(config, model, started_from)


def choose_talking_heads(model: nn.Module, choice: talking_heads.Choice) -> None:
    """Compute CaiT's attention as ``--talking-heads`` says. Raises OptionError without any."""
    if choice != "auto" and not any(isinstance(m, Attention_talking_head) for m in model.modules()):
        raise OptionError("talking_heads", "the model has no talking heads: leave it out")
    talking_heads.set_path(choice)


def _preprocessing(config: Config, model: nn.Module, started_from: dict[str, Any]) -> Preprocessing:
    """Normalisation as asked for, else of the weights to start from, else of the data set."""
    saved = started_from.get("preprocessing")
    own = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    if saved is not None:
        mean, std = tuple(saved["mean"]), tuple(saved["std"])
    elif config.model.pretrained or config.model.finetune:
        mean, std = own
    else:
        mean, std = datasets.default_normalization(config.data.data_set) or own
    mean, std = config.data.mean or mean, config.data.std or std
    return Preprocessing(
        input_size=config.model.input_size,
        crop_ratio=config.data.eval_crop_ratio,
        interpolation="bicubic",
        mean=three_values(mean),
        std=three_values(std),
    )


def three_values(values: Sequence[float]) -> tuple[float, ...]:
    """One value for each colour."""
    return tuple(values) * (3 // len(values))


def build_criterion(
    config: Config, data: Data, preprocessing: Preprocessing, device: torch.device
) -> nn.Module:
    """The loss of ``--loss``, class weights and distillation, on the device."""
    counts = None
    if config.loss.class_weights != "none":
        if data.train.targets is None:
            raise OptionError("class_weights", "needs the label of every picture beforehand, which "
                              f"{config.data.data_set} doesn't give: leave it out")  # fmt: skip
        counts = torch.bincount(
            torch.as_tensor(data.train.targets), minlength=len(data.class_names)
        )
    teacher = losses.build_teacher(
        config.loss,
        num_classes=len(data.class_names),
        input_size=config.model.input_size,
        class_names=data.class_names,
        normalization=(preprocessing.mean, preprocessing.std),
    )
    criterion = losses.build_criterion(
        config.loss, num_classes=len(data.class_names), class_counts=counts, teacher=teacher
    )
    return criterion.to(device)


def build_state(
    config: Config,
    model: nn.Module,
    data: Data,
    processes: utils.Processes,
    device: torch.device,
) -> tuple[TrainState, optim.Freezer]:
    """Optimiser, schedule, scaler and moving average around ``model``."""
    average = copy.deepcopy(model) if config.ema.model_ema else None
    if config.dist.fsdp and not processes.distributed:
        raise OptionError("fsdp", "one process has nobody to share with: start with torchrun "
                          "--nproc-per-node N, or leave it out")  # fmt: skip
    if config.dist.fsdp:
        amp = utils.amp_dtype(config.optim.amp, device)
        for module in filter(None, (model, average)):
            parallel.shard(module, device, amp)
    ema = None
    if average is not None:
        ema = ModelEma(
            model,
            config.ema.model_ema_decay,
            warmup=config.ema.model_ema_warmup,
            device=torch.device("cpu") if config.ema.model_ema_force_cpu else None,
            average=average,
        )

    def wrap(module: nn.Module) -> nn.Module:
        if processes.distributed and not config.dist.fsdp:
            # Freezing changes what takes part, but the model is wrapped anew then.
            module = parallel.replicate(module, device, static=config.optim.accum_steps == 1)
        return compiled(config, module)

    batch = effective_batch(config, processes)
    lr = optim.scaled_lr(config.optim.lr, batch, config.optim.unscale_lr)
    optimizer = optim.build_optimizer(model, config.optim, lr=lr, required=config.explicit())
    freezer = optim.Freezer(
        model,
        attn_only=config.model.attn_only,
        freeze=config.model.freeze,
        unfreeze_at=config.model.unfreeze_at,
    )
    freezer.apply(0)
    schedule = optim.Schedule(
        config.schedule,
        lr=lr,
        epochs=config.run.epochs,
        updates_per_epoch=data.updates_per_epoch(config),
        lower_is_better=config.save.best_metric.endswith("loss"),
        seed=config.run.seed,
        required=config.explicit(),
    )
    scaled = utils.amp_dtype(config.optim.amp, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type) if scaled else None
    progress = Progress(
        updates_per_epoch=data.updates_per_epoch(config),
        world_size=processes.world_size,
        batch_size=config.data.batch_size,
    )
    return TrainState(model, optimizer, schedule, scaler, ema, wrap, progress), freezer


def step_options(
    config: Config,
    processes: utils.Processes,
    device: torch.device,
    data: Data,
    model: nn.Module,
    macs: int = 0,
) -> engine.StepOptions:
    """How the engine is to make a step; ``data`` has its transforms, ``macs`` are the model's."""
    amp = utils.amp_dtype(config.optim.amp, device)
    return engine.StepOptions(
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
        input_size=config.model.input_size,
        prepare=data.prepare,
        macs=macs,
        peak=utils.device_peak(device, amp),
    )


def compiled(config: Config, module: nn.Module) -> nn.Module:
    """``module``, compiled if ``--compile`` says so."""
    return torch.compile(module, mode=config.model.compile_mode) if config.model.compile else module


def effective_batch(config: Config, processes: utils.Processes) -> int:
    """Pictures that make one update: batch × processes × accumulated batches."""
    return config.data.batch_size * processes.world_size * config.optim.accum_steps
