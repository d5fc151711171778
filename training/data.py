"""The data of a run: sets, their order, their loaders, and how images become the model's input."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from augmentation.batch import Normalise, augments_by_batch, build_train_transform
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Form, Transform
from augmentation.transforms import CentreCrop
from checkpointing.files import class_names_of, split_of
from config import Config, stages, train_size
from distributed.processes import Processes
from distributed.sharing import once_per_machine
from errors import OptionError
from pipeline import jpeg
from pipeline.cache import CachedLoader, apply_cache, check_crops
from pipeline.dataset import ImageDataset, build_parts, findings
from pipeline.disk_cache import GB, DiskOptions, disk_cached
from pipeline.loader import Loader, LoaderSettings, TooFewImagesError
from pipeline.sources.base import may_be_shared
from pipeline.workers import auto_num_workers, batch_bytes, free_shared_memory, most_workers
from samplers import (
    BalancedSampler,
    EpochSampler,
    EvalSampler,
    RASampler,
    ShuffleSampler,
    UndersampleSampler,
)
from utils import cores

log = logging.getLogger(__name__)


class Sets(NamedTuple):
    """The training and the validation set, without transforms yet, and how training is loaded."""

    train: ImageDataset
    val: ImageDataset
    sampler: EpochSampler
    settings: LoaderSettings
    steps: int
    """Batches per epoch and process."""
    split: dict[str, Any]
    """How the parts were drawn: "seed", "held_out" (:func:`split_of`), and the number of images
    to "train" on."""

    @property
    def class_names(self) -> list[str]:
        return list(self.train.classes)


@dataclass(frozen=True)
class Data:
    """The two sets, how they are ordered and loaded, and what they are called."""

    train: ImageDataset
    val: ImageDataset
    class_names: list[str]
    sampler: EpochSampler
    train_loader: Loader | CachedLoader
    val_loader: Loader | CachedLoader
    steps: int
    """Batches per epoch and process."""
    split: dict[str, Any]
    """How the parts were drawn, see :class:`Sets`."""
    prepare: Normalise
    """What makes the model's input of uint8 batches, on the device."""
    train_size: tuple[int, int]
    """Height and width of training images."""

    def updates_per_epoch(self, config: Config) -> int:
        return math.ceil(self.steps / config.optim.accum_steps)

    def batches(self, epoch: int, samples: int = 0) -> Loader | CachedLoader:
        """The batches of ``epoch`` after the first ``samples`` images."""
        self.sampler.set_epoch(epoch, samples)
        return self.train_loader

    def source_description(self, device: torch.device) -> str:
        """Where training images come from and are augmented."""
        source = self.train_loader.introduction()
        if self.train.transform.by_batch:
            loader = self.train_loader
            workers = loader.num_workers and loader.settings.alter
            where = "in the workers" if workers else f"on {device}"
            return f"{source}; augmented by the batch {where}"
        why = self.train.transform.alone
        return f"{source}; augmented one by one on the host" + (
            f" ({why} takes one image at a time)" if why else ""
        )

    def news(self) -> Iterator[str]:
        """What there is to say of images kept on disk since the last call, a sentence each."""
        # Both parts may have filled the same folder, which is said once.
        said = (text for part in (self.train, self.val) for text in part.source.news())
        yield from dict.fromkeys(said)

    def ways_to_feed_faster(self, config: Config) -> list[str]:
        """What to change where the device waits for images, the easiest first."""
        if self.train_loader.from_store:
            on_device = config.data.cache == "device"
            return ["a larger --batch-size"] if on_device else ["--cache device"]
        workers, available = self.train_loader.num_workers, cores()
        ways = []
        if workers < available:
            ways.append(
                f"--num-workers {available} (now {workers}, the machine has {available} cores)"
            )
        if not (self.train.transform.by_batch or self.train.transform.alone):
            ways.append("--augment-on device")
        if not self.train_loader.cached:
            ways.append("--cache ram, if the decoded images fit")
        if not (self.train.source.decoded or jpeg.is_fast()):
            ways.append(f"for JPEG files, {jpeg.HINT}")
        if not self.train.source.decoded:
            ways.append("smaller files: python -m tools.data pack --short-side 256")
        return ways


def build_sets(
    config: Config, processes: Processes, resumed: Mapping[str, Any] | None = None
) -> Sets:
    """The data sets of ``--data-set``; with ``--overfit-batches`` the few images, twice.

    In a run that is ``resumed`` from a checkpoint the images that ``--val-fraction`` held out at
    first are held out. All that can be checked without the model is checked here: raises
    OptionError or DataError for what is wrong with the options or the files, for options that these
    sets can't fulfil, and for a ``--best-metric`` that this number of classes doesn't have.
    """
    train, val = read_once(config, processes, lambda: _parts(config, resumed or {}))
    seed, _ = split_of(resumed or {}, config.run.seed)
    split = {"seed": seed, "held_out": val.held_out, "train": len(train)}
    for text in findings(train, val):
        log.warning("%s", text)
    metric = config.save.best_metric
    if metric.endswith("acc5") and len(train.classes) < 5:
        raise OptionError("best_metric", f"{metric} needs at least 5 classes: use {metric[:-1]}1")
    if config.run.overfit_batches:
        count = config.run.overfit_batches * config.data.batch_size * processes.world_size
        if count > len(train):
            raise OptionError(
                "overfit_batches", f"{count} images are more than the {len(train)} there are"
            )
        order = ShuffleSampler(len(train), seed=config.run.seed).order(0)[:count].tolist()
        train = val = train.subset(order)
    sampler = build_sampler(config, train, processes)
    settings = loader_settings(config, processes, config.data.batch_size, drop_last=True)
    steps = len(Loader(train, sampler, settings))
    if config.optim.accum_steps > steps:
        raise TooFewImagesError(
            "accum_steps",
            f"an epoch has only {steps} batches to accumulate: lower it",
            len(sampler),
        )
    return Sets(train, val, sampler, settings, steps, split)


def read_once(
    config: Config, processes: Processes, build: Callable[[], tuple[ImageDataset, ...]]
) -> tuple[ImageDataset, ...]:
    """The parts that ``build`` returns; the files are listed once on each machine.

    Not once for all machines: whether theirs are the same is compared, not taken for granted.
    """
    try:
        status = os.stat(os.path.expanduser(config.data.data_path))
        folder = f"{status.st_dev} {status.st_ino}"
    except (OSError, ValueError):  # an address, or nothing: building says it
        folder = ""
    return once_per_machine(
        processes,
        build,
        (repr(config.data), os.getcwd(), folder),
        shareable=lambda parts: all(may_be_shared(part.source) for part in parts),
    )


def _parts(config: Config, resumed: Mapping[str, Any]) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation part, drawn as in the run that is ``resumed``."""
    seed, before = split_of(resumed, config.run.seed)
    train, val = build_parts(config.data, seed=seed, held_out=before)
    if before is None or val.held_out is None or class_names_of(resumed) != list(val.classes):
        return train, val
    gone = len(before) - int(torch.isin(before, val.held_out).sum())
    if gone == len(before):
        raise OptionError(
            "data_path",
            f"none of the {gone} images that this run validates on is there: name the folder where "
            "they are, or start anew with --finetune",
        )
    if gone:
        log.warning("%d of the %d images that this run validates on are gone", gone, len(before))
    return train, val


def build_data(
    config: Config,
    processes: Processes,
    sets: Sets,
    preprocessing: Preprocessing,
    device: torch.device,
    epoch: int = 0,
) -> Data:
    """Transforms, loaders and caches of this process; training begins in ``epoch``.

    Raises OptionError for images that can't be cached as asked for.
    """
    transform: Transform = CentreCrop(preprocessing)
    val = sets.val.with_transform(transform)
    size = train_size(config.model, epoch)
    if not config.run.overfit_batches:
        transform = _train_transform(config, preprocessing, size)
    train = sets.train.with_transform(transform)
    # A CPU that computes has no time left for what workers can do.
    settings = replace(sets.settings, alter=device.type == "cpu")
    train_loader: Loader | CachedLoader = Loader(train, sets.sampler, settings)
    val_loader: Loader | CachedLoader = build_val_loader(config, val, processes)
    cache = config.data.cache
    if config.run.overfit_batches and cache == "auto":
        cache = "none"  # labels or pixels that change from read to read are to show
    if cache == "device":  # at the sizes of later epochs too
        for stage in stages(config.model.train_sizes):
            check_crops(_train_transform(config, preprocessing, stage.size))
    keep = partial(apply_cache, cache, device=device, visible=processes.is_main)
    if cache == "disk":
        kept = _disk_options(config, preprocessing)
        keep = partial(disk_cached, options=kept, visible=processes.is_main)
    train_loader, val_loader = keep(train_loader), keep(val_loader)
    return Data(
        train=train_loader.dataset,
        val=val_loader.dataset,
        class_names=sets.class_names,
        sampler=sets.sampler,
        train_loader=train_loader,
        val_loader=val_loader,
        steps=sets.steps,
        split=sets.split,
        prepare=transform if transform.by_batch else Normalise(preprocessing),
        train_size=size,
    )


def _train_transform(
    config: Config, preprocessing: Preprocessing, size: tuple[int, int]
) -> Transform:
    at_size = replace(preprocessing, input_size=size)
    return build_train_transform(at_size, config.augment, config.run.seed)


def with_train_size(
    data: Data,
    config: Config,
    preprocessing: Preprocessing,
    size: tuple[int, int],
    device: torch.device,
    visible: bool,
) -> Data:
    """``data`` with training images of another ``size``; ``visible``: show how far reading is.

    Images that are kept as they are stay where they are. Those that are kept ready for crops are
    read anew.
    """
    transform, before = _train_transform(config, preprocessing, size), data.train_loader
    train = before.dataset.with_transform(transform)
    # It may stand where a resumed epoch had few images left, or none.
    before.sampler.set_epoch(before.sampler.epoch)
    loader: Loader | CachedLoader = Loader(train, before.sampler, before.settings)
    if before.from_store:
        loader = apply_cache(config.data.cache, loader, device=device, visible=visible)
    return replace(
        data,
        train=loader.dataset,
        train_loader=loader,
        prepare=transform if transform.by_batch else Normalise(preprocessing),
        train_size=size,
    )


def kept_side(config: Config) -> int:
    """Short side in pixels that ``--cache disk`` keeps training images with; 0: as they are."""
    side = config.data.cache_side
    return math.ceil(max(config.model.size) * 8 / 7) if side == "auto" else side


def _disk_options(config: Config, preprocessing: Preprocessing) -> DiskOptions:
    """How ``--cache disk`` keeps images. Raises OptionError."""
    data, needed = config.data, max(preprocessing.size)
    side = kept_side(config)
    if 0 < side < needed:
        raise OptionError(
            "cache_side", f"{side} is less than the input's {needed} pixels: give more, or 0"
        )
    scaled = config.augment.jpeg_scaling == "on"
    return DiskOptions(data.cache_dir, int(data.cache_gb * GB), side, scaled)


def build_sampler(config: Config, train: ImageDataset, processes: Processes) -> EpochSampler:
    """The order of training, of which this process has its share."""
    seed, groups = config.run.seed, train.source.groups
    world = {"num_replicas": processes.world_size, "rank": processes.rank}
    kind = config.data.sampler
    if kind != "shuffle":
        if train.targets is None:
            raise OptionError(
                "sampler",
                f"{kind} needs the label of every image beforehand, which "
                f"{config.data.data_set} doesn't give: leave it out",
            )
        if kind == "undersample":
            return UndersampleSampler(train.targets, seed=seed, groups=groups, **world)
        return BalancedSampler(train.targets, seed=seed, **world)
    if config.augment.repeated_aug and not config.run.overfit_batches:
        return RASampler(len(train), seed=seed, groups=groups, **world)
    return ShuffleSampler(len(train), seed=seed, groups=groups, **world)


def build_val_loader(config: Config, val: ImageDataset, processes: Processes) -> Loader:
    """This process's share of the validation set in order, or all of it with ``--no-dist-eval``."""
    shared = config.dist.dist_eval
    sampler = EvalSampler(
        len(val),
        num_replicas=processes.world_size if shared else 1,
        rank=processes.rank if shared else 0,
    )
    # At most the whole set: batches are filled up, and a process may have few images.
    batch_size = min(
        config.data.eval_batch_size or math.ceil(1.5 * config.data.batch_size), len(val)
    )
    return Loader(val, sampler, loader_settings(config, processes, batch_size, drop_last=False))


def loader_settings(
    config: Config, processes: Processes, batch_size: int, *, drop_last: bool
) -> LoaderSettings:
    """How batches are loaded. Raises OptionError if the workers' batches don't fit /dev/shm."""
    return LoaderSettings(
        batch_size=batch_size,
        num_workers=_num_workers(config, processes, warn=drop_last),
        pin_memory=config.data.pin_mem and config.run.device != "cpu",
        drop_last=drop_last,
        seed=config.run.seed,
        timeout=config.data.loader_timeout,
    )


def worker_batch_bytes(config: Config) -> int:
    """Bytes of a training batch on its way from a worker."""
    by_batch = augments_by_batch(config.augment)
    images = config.data.batch_size * max(1, config.augment.aug_splits)
    form = Form(config.model.in_chans, config.data.bit_depth)
    return batch_bytes(images, config.model.size, by_batch=by_batch, form=form)


def _num_workers(config: Config, processes: Processes, *, warn: bool) -> int:
    """``--num-workers``, as many as the shared memory has room for; ``warn`` of fewer, once for all
    loaders of a run."""
    most = most_workers(
        worker_batch_bytes(config), processes.local_world_size, free_shared_memory()
    )
    wanted = config.data.num_workers
    workers = auto_num_workers(processes.local_world_size) if wanted == "auto" else wanted
    if most is None or workers <= most:
        return workers
    if wanted == "auto":
        if warn:
            log.warning(
                "%d workers instead of %d: /dev/shm has no room for more; in a container, see "
                "--shm-size",
                most,
                workers,
            )
        return most
    raise OptionError(
        "num_workers",
        f"/dev/shm has room for the batches of {most} workers, not of {workers}: lower it, or "
        "--batch-size, or give the container --shm-size=8g",
    )
