"""The story of a run: processes, data, model, criterion, state, resume, epochs."""

import copy
import dataclasses
import itertools
import json
import logging
import math
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import checkpoint
import datasets
import engine
import inference
import losses
import models
import optim
import utils
from augment import Preprocessing, build_mixer
from config import CHECKPOINT, DEFAULT, Config, to_yaml, unused
from errors import CheckpointError, DataError, DivergedError, OptionError
from lock import RunLock
from loggers import (
    CURVES_FILE,
    LOG_FILE,
    ProgressBar,
    RunLogger,
    Stopwatch,
    write_per_class,
)
from samplers import BalancedSampler, EpochSampler, EvalSampler, RASampler, ShuffleSampler
from state import ModelEma, Progress, TrainState, check_same_weights, is_better

log = logging.getLogger(__name__)

PER_CLASS_FILE = "per_class.csv"
CONFIG_FILE = "config.yaml"
BAD_IMAGES_FILE = "bad_images.txt"
# Above this many classes a table of them is no longer read by anybody.
PER_CLASS_LIMIT = 1000
MAX_ROLLBACKS = 5


def run(config: Config) -> int:
    """Train (or, with ``--eval``, evaluate) as ``config`` says; returns the exit code."""
    processes = utils.init_distributed(config.dist, config.run.device)
    utils.setup_messages(processes)
    device = utils.pick_device(config.run.device, processes.local_rank)
    utils.set_determinism(config.run.deterministic)
    utils.import_plugins(config.run.plugin)
    if config.run.eval:
        return _evaluate_only(config, processes, device)
    if config.run.overfit_batches:
        config = _overfitting(config)

    folder = output_folder(config)
    locks: list[RunLock] = []
    utils.on_main_process(processes, lambda: locks.append(_open_folder(config, folder)))
    try:
        return _train(config, processes, device, folder)
    finally:
        for lock in locks:
            lock.release()


def _train(config: Config, processes: utils.Processes, device: torch.device, folder: Path) -> int:
    """The story of a training run, into ``folder``."""
    start = _find_start(config, folder)
    data = build_data(config, processes)
    utils.seed_all(config.run.seed)
    resumed = start[1] if start else None
    model, preprocessing = build_model(config, len(data.class_names), device, resumed)
    data.set_transforms(config, preprocessing)
    criterion = build_criterion(config, data, preprocessing, device)
    state, freezer = build_state(config, model, data, processes, device)
    state.progress.updates_per_epoch = data.updates_per_epoch(config)
    state.progress.world_size = processes.world_size
    if start is not None:
        _resume(state, config, data, processes, *start)
        without_best: list[bool] = []
        utils.on_main_process(
            processes,
            lambda: without_best.append(_settle_folder(folder, state.progress, start[0])),
        )
        if utils.any_process(any(without_best)):
            state.progress.best = state.progress.reference = None
    elif config.run.start_epoch:
        _start_at(state.progress, config.run.start_epoch, data.updates_per_epoch(config))
    if processes.is_main:
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")

    bad_images = resumed.get("bad_images", ()) if resumed else ()
    trainer = Trainer(
        config,
        processes,
        folder,
        data,
        preprocessing,
        criterion,
        state,
        freezer,
        device,
        bad_images,
    )
    trainer.introduce()
    with utils.StopRequest() as stop:
        return trainer.fit(stop)


def _evaluate_only(config: Config, processes: utils.Processes, device: torch.device) -> int:
    """``--eval``: judge a checkpoint (its average too), or published or given weights."""
    folder = output_folder(config)
    utils.on_main_process(processes, lambda: _make_writable(folder))
    class_names, content = None, None
    if config.run.resume:
        source, content = _checkpoint_to_judge(config)
        class_names = content.get("class_names")
    with utils.main_process_first(processes):
        val = datasets.build_dataset(
            False, config.data, None, seed=config.run.seed, classes=class_names
        )
    candidates: dict[str, nn.Module] = {}
    if content is not None:
        preprocessing = _asked_preprocessing(config, content)
        classifier = inference.from_content(content, device=device, preprocessing=preprocessing)
        candidates["model"], val.transform, class_names = classifier
        if content.get("model_ema") is not None:
            candidates["EMA"] = inference.from_content(
                content, device=device, ema=True, preprocessing=preprocessing
            ).model
    else:
        source, class_names = config.model.finetune or "published weights", val.classes
        candidates["model"], preprocessing = build_model(config, len(class_names), device)
        val.transform = datasets.build_transform(False, preprocessing, config.augment)
    if list(val.classes) != list(class_names):
        raise DataError(
            f"the classes of {config.data.data_path or config.data.data_set} "
            f"({_some(val.classes)}) are not those of the model ({_some(class_names)})"
        )
    loader = build_val_loader(config, val, processes)
    options = engine.StepOptions(
        device=device,
        amp=utils.amp_dtype(config.optim.amp, device),
        channels_last=config.model.channels_last,
    )
    log.info("%s on %d pictures of %d classes", source, len(val), len(class_names))
    for name, model in candidates.items():
        bar = ProgressBar(f"evaluate {name}", len(loader), visible=processes.is_main)
        bad: dict[str, None] = {}
        result = engine.evaluate(
            torch.compile(model) if config.model.compile else model,
            _noting(loader, bad),
            options,
            num_classes=len(class_names),
            shared=config.dist.dist_eval,
            progress=bar.to,
        )
        bar.close()
        if result.count == 0:
            raise DataError("no validation picture could be read")
        top5 = "" if result.acc5 is None else f"  top-5 {result.acc5:.3f} %"
        log.info(
            "%-6s top-1 %.3f %%%s  loss %.4f  (%d pictures)",
            name, result.acc1, top5, result.loss, result.count,
        )  # fmt: skip
        if bad:
            log.warning("%d pictures could not be read: %s", len(bad), "; ".join(bad))
        if processes.is_main and len(class_names) <= PER_CLASS_LIMIT:
            path = folder / f"eval_{name.lower()}_{PER_CLASS_FILE}"
            write_per_class(path, class_names, result)
            log.info("       each class: %s", path)
    return 0


def _noting(batches: Iterable[datasets.Batch], bad: dict[str, None]) -> Iterator[datasets.Batch]:
    """The batches; the pictures that couldn't be read are noted in ``bad``."""
    for batch in batches:
        bad |= dict.fromkeys(batch.bad)
        yield batch


def _asked_preprocessing(config: Config, content: dict[str, Any]) -> Preprocessing:
    """The checkpoint's preprocessing, but for what was asked for beside it."""

    def asked(name: str) -> bool:
        return config.origin[name] not in (DEFAULT, CHECKPOINT)

    if asked("model") and config.model.model != content["config"]["model"]:
        raise OptionError(
            "model", f"the checkpoint holds {content['config']['model']}: leave --model out"
        )
    changes: dict[str, Any] = {}
    if asked("input_size"):
        changes["input_size"] = config.model.input_size
    if asked("eval_crop_ratio"):
        changes["crop_ratio"] = config.data.eval_crop_ratio
    for name in ("mean", "std"):
        values = getattr(config.data, name)
        if asked(name) and values is not None:
            changes[name] = _three(values)
    return dataclasses.replace(Preprocessing.from_dict(content["preprocessing"]), **changes)


def _three(values: Sequence[float]) -> tuple[float, ...]:
    """One value for each colour."""
    return tuple(values) * (3 // len(values))


def _checkpoint_to_judge(config: Config) -> tuple[str, dict[str, Any]]:
    """The file of ``--resume``; ``auto`` is the best of the output directory, or its newest."""
    if config.run.resume != "auto":
        return config.run.resume, checkpoint.load_file(config.run.resume)
    folder = output_folder(config)
    if (folder / checkpoint.BEST).exists():
        return str(folder / checkpoint.BEST), checkpoint.load_file(folder / checkpoint.BEST)
    latest = checkpoint.load_latest(folder)
    if latest is None:
        raise OptionError("resume", f"there is no checkpoint in {folder}: name a file")
    return str(latest[0]), latest[1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if len(names) > 3 else "")


# --- folder and resume ----------------------------------------------------------------------------


def output_folder(config: Config) -> Path:
    """Where the run is written: ``--output-dir``, or ``output/MODEL-DATASET``."""
    if config.run.output_dir:
        return Path(config.run.output_dir).expanduser()
    name = f"{config.model.model}-{config.data.data_set}".replace("/", "-")
    return Path("output") / name


def _open_folder(config: Config, folder: Path) -> RunLock:
    """Make the output directory and lock it; refuse one that holds a run, unless ``--resume``."""
    resume = config.run.resume
    elsewhere = resume not in ("", "auto") and Path(resume).parent.resolve() != folder.resolve()
    if checkpoint.holds_run(folder) and (not resume or elsewhere):
        raise OptionError(
            "output_dir",
            f"{folder} already holds a run: add --resume auto to go on with it, choose another "
            "--output-dir, or remove it",
        )
    _make_writable(folder)
    return RunLock(folder)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OptionError(
            "output_dir", f"{folder} can't be written: {error.strerror}; choose another"
        ) from None


def _find_start(config: Config, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The checkpoint to go on from, with its name."""
    if config.run.resume == "auto":
        latest = checkpoint.load_latest(folder)
        if latest is None:
            log.info("nothing to resume in %s: starting anew", folder)
            return None
        return str(latest[0]), latest[1]
    if config.run.resume:
        return config.run.resume, checkpoint.load_file(config.run.resume)
    return None


def _resume(
    state: TrainState,
    config: Config,
    data: "Data",
    processes: utils.Processes,
    source: str,
    content: dict[str, Any],
) -> None:
    """Put ``state`` where the checkpoint was, and say what is not as it was."""
    saved_names = checkpoint.class_names_of(content)
    try:
        # The weights first: a new class count shows in their shapes.
        check_same_weights(state.model, content.get("model") or checkpoint.weights_of(content))
        if saved_names is not None and saved_names != data.class_names:
            raise CheckpointError(
                "it was trained on other classes; use --finetune to take its weights over"
            )
        opt = (content.get("config") or {}).get("opt", config.optim.opt)
        if opt != config.optim.opt:
            raise CheckpointError(
                f"it was written with --opt {opt}: resume with that, or start anew with --finetune"
            )
        state.load_state_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"--resume {source}: {error}") from None
    if "rng" in content:
        utils.set_rng_state(content["rng"])
    progress = state.progress
    per_epoch = data.updates_per_epoch(config)
    if config.run.start_epoch:
        _start_at(progress, config.run.start_epoch, per_epoch)
    elif (progress.updates_per_epoch, progress.world_size) != (per_epoch, processes.world_size):
        # The pictures seen stay seen; what is counted in batches starts anew behind them.
        share = progress.samples / data.sampler.num_samples
        progress.update = round((progress.epoch + share) * per_epoch)
        progress.step = 0
        log.warning(
            "%d updates an epoch on %d process(es) now, %d on %d before: no picture of the epoch "
            "is skipped or repeated, but batches, dropout and rate differ from the first plan",
            per_epoch, processes.world_size, progress.updates_per_epoch, progress.world_size,
        )  # fmt: skip
    progress.updates_per_epoch, progress.world_size = per_epoch, processes.world_size
    here = f", {progress.samples} pictures into the next" if progress.samples else ""
    log.info("resumed %s: %d epochs done%s", source, progress.epoch, here)
    recipe = config.recipe()
    for name, before in (content.get("config") or {}).items():
        if name in recipe and recipe[name] != before:
            log.info("  --%s is %s now, was %s", name.replace("_", "-"), recipe[name], before)


def _settle_folder(folder: Path, progress: Progress, source: str) -> bool:
    """Make the folder agree with the checkpoint that a run goes on from.

    Checkpoints of a future that the run has gone back behind are put aside. Returns whether there
    is no ``best.pth`` any more that the run could have to beat.
    """
    place = (progress.epoch, progress.samples)
    newer = checkpoint.newer_in_folder(folder, *place)
    best, path = folder / checkpoint.BEST, Path(source)
    if best.exists() and not _is_past(best, progress):
        newer.append(best)
    if newer:
        aside = folder / "set-aside"
        aside.mkdir(exist_ok=True)
        for file in newer:
            file.replace(aside / file.name)
        log.warning("%d newer checkpoints were put into %s", len(newer), aside)
    is_best = place == (progress.best_epoch + 1, 0) and progress.best is not None
    if is_best and path.parent.resolve() == folder.resolve():
        # The run may have died between writing the checkpoint and naming it the best.
        checkpoint.set_best(folder, path)
    return not best.exists()


def _is_past(best: Path, progress: Progress) -> bool:
    try:
        return checkpoint.load_file(best)["progress"]["epoch"] <= progress.epoch
    except (CheckpointError, KeyError):
        return False


def _start_at(progress: Progress, epoch: int, updates_per_epoch: int) -> None:
    """Count from ``--start-epoch``, at the beginning of that epoch."""
    progress.end_epoch()
    progress.epoch = epoch
    progress.update = epoch * updates_per_epoch
    if progress.best_epoch >= epoch:
        progress.best = progress.reference = None


def _overfitting(config: Config) -> Config:
    """The sanity run of ``--overfit-batches``: nothing that keeps the loss from zero."""
    return config.replace(
        "--overfit-batches",
        mixup=0.0, cutmix=0.0, cutmix_minmax=None, smoothing=0.0, drop=0.0, drop_path=0.0,
        drop_block=None, repeated_aug=False, resplit=False, reprob=0.0, cosub=False,
        sampler="shuffle",
    )  # fmt: skip


# --- data -----------------------------------------------------------------------------------------


@dataclass
class Data:
    """The two sets, how they are ordered and loaded, and what they are called."""

    train: datasets.ImageDataset
    val: datasets.ImageDataset
    class_names: list[str]
    sampler: EpochSampler
    train_loader: datasets.Loader
    val_loader: datasets.Loader
    steps: int
    """Batches an epoch and process."""

    def updates_per_epoch(self, config: Config) -> int:
        return math.ceil(self.steps / config.optim.accum_steps)

    def set_transforms(self, config: Config, preprocessing: Preprocessing) -> None:
        """Say how pictures become tensors, once the model's normalisation is known."""
        training = not config.run.overfit_batches
        self.train.transform = datasets.build_transform(training, preprocessing, config.augment)
        self.val.transform = datasets.build_transform(False, preprocessing, config.augment)

    def batches(self, epoch: int, samples: int = 0) -> datasets.Loader:
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
        sampler = RASampler(len(train), seed=seed, **world)
    else:
        sampler = ShuffleSampler(len(train), seed=seed, **world)
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
    batch_size = config.data.eval_batch_size or math.ceil(1.5 * config.data.batch_size)
    return datasets.build_loader(
        val, sampler, batch_size=batch_size, drop_last=False, **_loading(config, processes)
    )


def _loading(config: Config, processes: utils.Processes) -> dict[str, Any]:
    workers = config.data.num_workers
    if workers == "auto":
        workers = datasets.auto_num_workers(processes.local_world_size)
    return {
        "num_workers": workers,
        "pin_memory": config.data.pin_mem and config.run.device != "cpu",
        "seed": config.run.seed,
    }


# --- model, criterion, state ----------------------------------------------------------------------


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
    started_from = resumed or {}
    if options.finetune and resumed is None:
        started_from = checkpoint.load_file(options.finetune)
        report = models.load_pretrained_weights(model, checkpoint.weights_of(started_from))
        log.info("finetune %s: %s", options.finetune, report.summary())
        if config.run.eval and (report.missing or report.skipped):
            raise OptionError(
                "finetune", "these weights don't fill the model, there is nothing to evaluate yet"
            )
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    model.to(device, memory_format=layout)
    return model, _preprocessing(config, model, started_from)


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
        mean=_three(mean),
        std=_three(std),
    )


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
    ema = None
    if config.ema.model_ema:
        ema = ModelEma(
            model,
            config.ema.model_ema_decay,
            warmup=config.ema.model_ema_warmup,
            device=torch.device("cpu") if config.ema.model_ema_force_cpu else None,
        )

    def wrap(module: nn.Module) -> nn.Module:
        if processes.distributed:
            ids = [device.index] if device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(module, ids, gradient_as_bucket_view=True)
        return torch.compile(module) if config.model.compile else module

    scaler = torch.amp.GradScaler(device.type) if scaled else None
    return TrainState(model, optimizer, schedule, scaler, ema, wrap), freezer


def effective_batch(config: Config, processes: utils.Processes) -> int:
    """Pictures that make one update: batch × processes × accumulated batches."""
    return config.data.batch_size * processes.world_size * config.optim.accum_steps


# --- epochs ---------------------------------------------------------------------------------------


class Trainer:
    """Runs the epochs and writes what comes of them."""

    def __init__(
        self,
        config: Config,
        processes: utils.Processes,
        folder: Path,
        data: Data,
        preprocessing: Preprocessing,
        criterion: nn.Module,
        state: TrainState,
        freezer: optim.Freezer,
        device: torch.device,
        bad_images: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.processes = processes
        self.folder = folder
        self.data = data
        self.preprocessing = preprocessing
        self.criterion = criterion
        self.state = state
        self.freezer = freezer
        self.mixer = build_mixer(config.augment, len(data.class_names))
        self.options = engine.StepOptions(
            device=device,
            batch_size=config.data.batch_size,
            seed=config.run.seed,
            rank=processes.rank,
            amp=utils.amp_dtype(config.optim.amp, device),
            accum_steps=config.optim.accum_steps,
            clip_grad=config.optim.clip_grad,
            clip_mode=config.optim.clip_mode,
            train_mode=config.augment.train_mode,
            on_nonfinite=config.optim.on_nonfinite,
            log_interval=config.log.log_interval,
            channels_last=config.model.channels_last,
        )
        self.total_epochs = config.run.epochs + config.schedule.cooldown_epochs
        self.bad_images: dict[str, None] = {}  # of this process, an ordered set
        self.listed_bad: dict[str, None] = dict.fromkeys(bad_images)  # of all, earlier sessions too
        self.writer = checkpoint.BackgroundWriter(folder, keep=config.save.keep)
        self.saved_at = time.monotonic()
        self.logger = self._open_logger()

    def _open_logger(self) -> RunLogger:
        progress = self.state.progress
        return RunLogger(
            self.folder if self.processes.is_main else None,
            tensorboard=self.config.log.tensorboard,
            print_epoch=self.config.log.print_epoch,
            epoch=progress.epoch,
            update=progress.update,
        )

    def introduce(self) -> None:
        """Say what is about to be trained on what, and how."""
        config, data, model = self.config, self.data, self.state.model
        summary = models.summarise(model, config.model.input_size)
        self.parameters = summary.parameters
        log.info(
            "model    %s: %.2f M parameters (%.2f M trainable), %.2f GMACs at %d×%d",
            config.model.model, summary.parameters / 1e6, summary.trainable / 1e6,
            summary.macs / 1e9, config.model.input_size, config.model.input_size,
        )  # fmt: skip
        log.info(
            "data     %s: %d training and %d validation pictures, %d classes",
            config.data.data_set, len(data.train), len(data.val), len(data.class_names),
        )  # fmt: skip
        _, lines = datasets.summarise_classes(data.train)
        for line in lines:
            warning = line.removeprefix("warning: ")
            log.log(logging.INFO if warning == line else logging.WARNING, "         %s", warning)
        batch = effective_batch(config, self.processes)
        rate = optim.scaled_lr(config.optim.lr, batch, config.optim.unscale_lr)
        rule = "as given" if config.optim.unscale_lr else f"{config.optim.lr:g} × {batch} / 512"
        log.info(
            "batch    %d = %d × %d process(es) × %d accumulated; learning rate %.3g (%s)",
            batch, config.data.batch_size, self.processes.world_size, config.optim.accum_steps,
            rate, rule,
        )  # fmt: skip
        amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[self.options.amp]
        log.info(
            "run      %d epochs of %d steps on %s in %s, into %s",
            self.total_epochs, data.steps, self.options.device, amp, self.folder,
        )  # fmt: skip
        for line in unused(config):
            log.warning("%s", line)
        if config.log.tb_graph:
            side = config.model.input_size
            self.logger.graph(model, torch.zeros(1, 3, side, side, device=self.options.device))

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self, stop: utils.StopRequest) -> int:
        """Train to the last epoch, an early stop or a signal; returns the exit code."""
        progress = self.state.progress
        if self.config.optim.on_nonfinite == "rollback" and not checkpoint.in_folder(self.folder):
            self._save({})
        while progress.epoch < self.total_epochs:
            watch = Stopwatch()
            if self.freezer.apply(progress.epoch) and self.processes.distributed:
                self.state.rewrap()
            rollbacks = progress.rollbacks
            if not self._train_epoch(stop):
                return self._interrupted(stop)
            progress = self.state.progress
            if progress.rollbacks > rollbacks:
                continue
            self._finish_epoch(watch)
            if self._out_of_patience():
                log.info(
                    "early stop: no better %s for %d epochs",
                    self.config.save.best_metric, self.config.save.early_stop,
                )  # fmt: skip
                break
            if stop.agreed() and progress.epoch < self.total_epochs:
                return self._interrupted(stop)
            if self.config.run.stop_at_epoch and progress.epoch >= self.config.run.stop_at_epoch:
                break
        return self._conclude()

    def _train_epoch(self, stop: utils.StopRequest) -> bool:
        """Train to the end of the epoch under way; False if asked to stop before."""
        progress = self.state.progress
        batches = self.data.batches(progress.epoch, progress.samples)
        steps = progress.step + len(batches)
        self.logger.start_epoch(progress.epoch, self.total_epochs, steps, progress.step)
        try:
            return engine.train_one_epoch(
                self.state,
                self.criterion,
                self._watched(batches),
                self.options,
                steps=steps,
                mixer=self.mixer,
                report=self.logger.step,
                wish=lambda: self._wish(stop),
                save=lambda: self._save({}),
                skipped=self._note_skipped,
            )
        except engine.NonFinite as failure:
            self.logger.end_bar()
            self._diverged(failure)
            return True
        except DataError:
            if stop.signal is None:
                raise
            # The signal went to the loader processes too.
            return False

    def _watched(self, batches: Any) -> Any:
        """Pass batches through; note bad pictures, move the bar, draw the first grid."""
        for number, batch in enumerate(batches):
            self._note_bad(batch.bad)
            self.logger.advance(self.state.progress.step)
            if number == 0 and self.state.progress.update == 0:
                self._show(batch)
            yield batch

    def _show(self, batch: datasets.Batch) -> None:
        """The pictures of ``batch`` as the model sees them, in TensorBoard."""
        images = batch.images
        if self.mixer is not None:
            images, _ = self.mixer(images.clone(), batch.targets, 0)
        self.logger.pictures(images, self.preprocessing.mean, self.preprocessing.std)

    def _note_bad(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.bad_images:
                self.bad_images[line] = None
                log.warning("picture skipped: %s", line)

    def _gather_bad(self) -> None:
        """Bring together what all processes could not read, and list it in the folder."""
        before = len(self.listed_bad)
        for lines in utils.gather(list(self.bad_images)):
            self.listed_bad |= dict.fromkeys(lines)
        if self.processes.is_main and len(self.listed_bad) > before:
            text = "".join(f"{line}\n" for line in self.listed_bad)
            (self.folder / BAD_IMAGES_FILE).write_text(text, encoding="utf-8")

    def _finish_epoch(self, watch: Callable[[], float]) -> None:
        """Evaluate, log and save after an epoch."""
        state, config, progress = self.state, self.config, self.state.progress
        if config.log.tb_histograms:
            self.logger.histograms(state.model, progress.update)
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "train_lr": state.schedule.last,
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
        }
        # Each process has gathered batch statistics of its own; those that are saved are judged.
        utils.broadcast_buffers(state.model)
        result = self._evaluate(state.model, "evaluate")
        record |= {"test_loss": result.loss, "test_acc1": result.acc1}
        if result.acc5 is not None:
            record["test_acc5"] = result.acc5
        if state.ema:
            utils.broadcast_buffers(state.ema.module)
            average = self._evaluate(state.ema.module, "evaluate EMA")
            record |= {"ema_loss": average.loss, "ema_acc1": average.acc1}
            if average.acc5 is not None:
                record["ema_acc5"] = average.acc5
        monitor = config.save.best_metric
        if monitor not in record:
            raise OptionError(
                "best_metric", f"{monitor} needs at least 5 classes: use {monitor[:-1]}1"
            )
        lower = monitor.endswith("loss")
        best = is_better(record[monitor], progress.best, lower=lower)
        delta = config.save.early_stop_delta
        if is_better(record[monitor], progress.reference, lower=lower, delta=delta):
            progress.reference, progress.improved_epoch = record[monitor], progress.epoch
        if best:
            progress.best, progress.best_epoch = record[monitor], progress.epoch
            if len(self.data.class_names) <= PER_CLASS_LIMIT and self.processes.is_main:
                shown = average if monitor.startswith("ema_") else result
                write_per_class(self.folder / PER_CLASS_FILE, self.data.class_names, shown)
        state.schedule.end_epoch(record[monitor])
        self._gather_bad()
        record |= {
            "n_parameters": self.parameters,
            "update": progress.update,
            "skipped_updates": progress.skipped,
            "bad_images": len(self.listed_bad),
            "epoch_seconds": watch(),
        }
        progress.end_epoch()
        self.logger.epoch(record, epochs=self.total_epochs, best=best)
        last = progress.epoch in (self.total_epochs, config.run.stop_at_epoch)
        if best or last or progress.epoch % config.save.save_every == 0:
            self._save(record, best=best)

    def _evaluate(self, model: nn.Module, name: str) -> engine.Evaluation:
        loader = self.data.val_loader
        self.logger.start_evaluation(len(loader), name)
        batches = (self._passed_on(batch) for batch in loader)
        if next(model.parameters()).device != self.options.device:
            # A moving average that lives in host memory.
            model = copy.deepcopy(model).to(self.options.device)
        result = engine.evaluate(
            model,
            batches,
            self.options,
            num_classes=len(self.data.class_names),
            shared=self.config.dist.dist_eval,
            progress=self.logger.advance,
        )
        self.logger.end_bar()
        if result.count == 0:
            raise DataError("no validation picture could be read")
        return result

    def _passed_on(self, batch: datasets.Batch) -> datasets.Batch:
        self._note_bad(batch.bad)
        return batch

    def _out_of_patience(self) -> bool:
        patience, progress = self.config.save.early_stop, self.state.progress
        return patience > 0 and progress.epoch - 1 - progress.improved_epoch >= patience

    # --- saving -----------------------------------------------------------------------------------

    def _save(self, metrics: dict[str, Any], *, best: bool = False) -> None:
        """Hand a checkpoint to the writer."""
        self.saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        content = self.state.state_dict() | {
            "rng": utils.rng_state(),
            "config": self.config.recipe(),
            "class_names": self.data.class_names,
            "preprocessing": self.preprocessing.to_dict(),
            "metrics": metrics,
            "bad_images": list(self.listed_bad),
            "versions": versions(),
        }
        self.writer.submit(content, best=best)

    def _wish(self, stop: utils.StopRequest) -> engine.Wish:
        """What all processes do after this update: stop, save or go on."""
        if stop.agreed():
            return engine.Wish.STOP
        options = self.config.save
        due = (
            options.save_every_steps and self.state.progress.update % options.save_every_steps == 0
        )
        if options.save_every_minutes:
            minutes = (time.monotonic() - self.saved_at) / 60
            due = utils.any_process(minutes >= options.save_every_minutes) or due
        return engine.Wish.SAVE if due else engine.Wish.GO

    def _interrupted(self, stop: utils.StopRequest) -> int:
        """Save where training stands, say how to go on."""
        self.logger.end_bar()
        progress = self.state.progress
        self.writer.wait()
        here = checkpoint.name_of(progress.epoch, progress.samples)
        if self.writer.saved is None or self.writer.saved.name != here:
            self._save({})
            self.writer.wait()
        # Launchers end all processes as soon as one leaves: none may before this is written.
        utils.barrier()
        self.logger.close()
        log.info("stopped by signal %d; saved %s", stop.signal, self.writer.saved)
        log.info("go on with: %s", self._go_on_command())
        return 128 + (stop.signal or 0)

    def _go_on_command(self) -> str:
        return self._command("--resume", str(self.writer.saved))

    def _command(self, *arguments: str) -> str:
        # A checkpoint doesn't get to name code to import, so plugins are named anew.
        plugins = ("--plugin", *self.config.run.plugin) if self.config.run.plugin else ()
        return shlex.join(["python", "main.py", *arguments, *plugins])

    def _note_skipped(self, count: int, step: int, update: int) -> None:
        """Say that updates were left out, and keep the names of the first one's pictures."""
        path = self._dump_nonfinite(step, update, None)
        log.warning(
            "%d updates left out, loss or gradient not finite; the first was update %d, see %s",
            count, update, path,
        )  # fmt: skip

    def _dump_nonfinite(self, step: int, update: int, culprit: str | None) -> Path:
        """Write down what this process saw in an update that failed."""
        progress, data, processes = self.state.progress, self.data, self.processes
        width = self.config.data.batch_size * processes.world_size
        # The step's place in the epoch, also where the session resumed with other batches.
        first = progress.samples + (step - progress.step) * width + processes.rank
        last = first + self.config.optim.accum_steps * width
        indices = data.sampler.order(progress.epoch)[first : last : processes.world_size]
        path = self.folder / f"nonfinite-rank{processes.rank}.json"
        report = {
            "update": update,
            "epoch": progress.epoch,
            "step": step,
            "learning_rate": self.state.schedule.rate(update) * self.state.schedule.factor,
            "first_nonfinite": culprit,
            "pictures": [data.train.sample_id(i) for i in indices.tolist()],
        }
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return path

    def _find_culprit(self, step: int) -> str | None:
        """Repeat the failed update's batches and name what goes wrong first."""
        progress = self.state.progress
        width = self.config.data.batch_size * self.processes.world_size
        samples = progress.samples + (step - progress.step) * width
        batches = self.data.batches(progress.epoch, samples)
        for offset, batch in enumerate(itertools.islice(batches, self.options.accum_steps)):
            culprit = engine.first_nonfinite(
                self.state, self.criterion, batch, self.options, step + offset, self.mixer
            )
            if culprit:
                return culprit
        return None

    def _diverged(self, failure: engine.NonFinite) -> None:
        """Say where it went wrong; go back to the last checkpoint, or stop."""
        state, options = self.state, self.config.optim
        culprit = self._find_culprit(failure.step)
        path = self._dump_nonfinite(failure.step, failure.update, culprit)
        rate = state.schedule.rate(failure.update) * state.schedule.factor
        where = f"first in {culprit}" if culprit else "it did not come again on a second try"
        what = (
            f"loss or gradient not finite at update {failure.update} (epoch "
            f"{state.progress.epoch + 1}, step {failure.step + 1}), learning rate {rate:.3g}; "
            f"{where}; its pictures are listed in {path}"
        )
        self.writer.wait()
        rollbacks = state.progress.rollbacks + 1
        if options.on_nonfinite != "rollback" or rollbacks > MAX_ROLLBACKS:
            raise DivergedError(
                f"{what}. The last good weights are in {self.writer.saved or 'no checkpoint yet'}. "
                "Lower --lr, or add --clip-grad 1, --amp off, or another --on-nonfinite"
            )
        utils.barrier()
        source, content = checkpoint.load_latest(self.folder)
        state.load_state_dict(content)
        state.progress.rollbacks = rollbacks
        if options.rollback_fp32_steps:
            # Twice as many each time: the trouble may lie a little further on.
            steps = options.rollback_fp32_steps * 2 ** (rollbacks - 1)
            state.progress.precise_until = state.progress.update + steps
            how = f"in full precision for {steps} updates"
        else:
            state.schedule.factor = 0.5**rollbacks
            how = f"with the rate times {state.schedule.factor:g}"
        log.warning("%s; going back to %s, %s", what, source, how)
        self.logger.close()
        self.logger = self._open_logger()

    def _conclude(self) -> int:
        """Say what was reached and where everything is."""
        progress, config = self.state.progress, self.config
        self.writer.wait()
        if self.logger.records:
            final = {k: v for k, v in self.logger.records[-1].items() if isinstance(v, float)}
            self.logger.hyper_parameters(config.recipe(), final)
        self.logger.close()
        if self.listed_bad:
            log.warning("%d pictures could not be read and were skipped; they are listed in %s",
                        len(self.listed_bad), self.folder / BAD_IMAGES_FILE)  # fmt: skip
        if self.writer.error:
            log.error("the last checkpoint is missing: free space, then --resume auto")
            return 1
        best = self.folder / checkpoint.BEST
        if progress.best is not None:
            log.info("best     %s %.2f after epoch %d", config.save.best_metric, progress.best,
                     progress.best_epoch + 1)  # fmt: skip
        weights = best if best.exists() else self.writer.saved
        log.info("weights  %s", weights)
        log.info("curves   %s", self.folder / CURVES_FILE)
        log.info(
            "logs     %s and TensorBoard: tensorboard --logdir %s",
            self.folder / LOG_FILE,
            self.folder,
        )
        if progress.epoch < self.total_epochs and config.run.stop_at_epoch:
            log.info("next     %s", self._go_on_command())
        else:
            log.info("next     %s", self._command("--eval", "--resume", str(weights)))
        return 0


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
    }
