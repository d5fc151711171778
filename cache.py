"""Decoded pictures in memory: no decoding after the first time, and small ones by whole batches.

Pictures of one size whose crop moves whole pixels (CIFAR's kind, ``--src``) are kept as one uint8
tensor, in host memory or on the device, and leave it by the batch, without loader processes
(``CachedLoader``). Others are kept as they are (``MemorySource``) and take the usual way. In both
cases the model sees the pixels it would have seen without a cache.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from batch_augment import BatchAugment, Plan, resize_short_side
from datasets import (
    ArraySource,
    BadPictureError,
    Batch,
    FileSource,
    ImageDataset,
    Loader,
    Source,
    Subset,
    cores,
    decode,
    decode_tensor,
)
from errors import DataError, OptionError
from loggers import ProgressBar

log = logging.getLogger(__name__)

# What ``auto`` takes for small.
SMALL_SIDE = 96  # pixels
SMALL_SET = 2 << 30  # bytes
PROBES = 32  # files that are looked at before all are read


@dataclass
class Store:
    """All pictures of a data set in one tensor."""

    images: torch.Tensor  # (N, 3, H, W) uint8, those for training with their margins
    targets: torch.Tensor  # (N,) int64, on the same device
    bad: dict[int, str]  # "path: reason" of those that can't be read; their pixels are zero


class MemorySource(Source):
    """Another source's pictures, decoded, in memory that loader processes share."""

    def __init__(
        self, source: Source, pictures: Sequence[torch.Tensor | None], targets: np.ndarray
    ) -> None:
        self.source = source
        self.classes = source.classes
        self.targets = targets
        self.shapes = np.array([(0, 0) if p is None else p.shape[1:] for p in pictures])
        ends = np.cumsum(3 * self.shapes.prod(1))
        self.starts = ends - 3 * self.shapes.prod(1)
        self.pixels = torch.empty(int(ends[-1]), dtype=torch.uint8).share_memory_()
        for number, picture in enumerate(pictures):
            if picture is not None:
                self._place(number).copy_(picture.permute(1, 2, 0))

    def _place(self, index: int) -> torch.Tensor:
        """(H, W, 3), a part of ``pixels``."""
        height, width = self.shapes[index].tolist()
        start = int(self.starts[index])
        return self.pixels[start : start + 3 * height * width].view(height, width, 3)

    def open(self, index: int) -> Any:
        # One that couldn't be read is tried again, for the reason.
        readable = self.shapes[index].all()
        return self._place(index).numpy() if readable else self.source.open(index)

    def sample_id(self, index: int) -> str:
        return self.source.sample_id(index)


class CachedLoader:
    """Batches of a ``Store``, made where it is; what ``datasets.Loader`` gives, without processes.

    augment: crops and plans training pictures, whose margins are in the store; None leaves
        pictures as they are
    alter: also does flips and the policy, many batches at a time, which spares small pictures most
        of what an operation costs besides its work
    """

    CHUNK = 1024  # pictures

    def __init__(
        self, store: Store, loader: Loader, augment: BatchAugment | None, *, alter: bool
    ) -> None:
        self.store = store
        self.dataset = loader.dataset
        self.sampler = loader.sampler
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self.augment = augment
        self.alter = alter
        self._use = np.arange(len(store.images))
        if store.bad and loader.dataset.is_train:
            # The next readable one takes a bad one's place, as without a cache.
            good = np.setdiff1d(self._use, list(store.bad))
            self._use = good[np.searchsorted(good, self._use) % len(good)]

    def __len__(self) -> int:
        batches, rest = divmod(len(self.sampler), self.batch_size)
        return batches + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        indices, positions = self.sampler.share()
        end = len(indices) - (len(indices) % self.batch_size if self.drop_last else 0)
        at_once = self.batch_size * (max(1, self.CHUNK // self.batch_size) if self.alter else 1)
        for start in range(0, end, at_once):
            part = slice(start, min(start + at_once, end))
            yield from self._batches(indices[part], positions[part])

    def _batches(self, wanted: np.ndarray, positions: np.ndarray) -> Iterator[Batch]:
        indices, epoch, plan = self._use[wanted], self.sampler.epoch, None
        if self.augment is None:
            images = self.store.images[_there(indices, self.store.images)]
        else:
            images = self.augment.take(self.store.images, indices, epoch, positions)
            plan = self.augment.plan(epoch, positions)
            if self.alter:
                images, plan = self.augment.alter(images, plan), plan.altered()
        for start in range(0, len(wanted), self.batch_size):
            part = slice(start, start + self.batch_size)
            mine = None if plan is None else plan.of(part)
            yield self._batch(images[part], wanted[part], indices[part], positions[part], mine)

    def _batch(
        self,
        images: torch.Tensor,
        wanted: np.ndarray,
        indices: np.ndarray,
        positions: np.ndarray,
        plan: Plan | None,
    ) -> Batch:
        bad: list[str] = []
        if self.store.bad:
            bad = [self.store.bad[i] for i in wanted.tolist() if i in self.store.bad]
        if bad and not self.dataset.is_train:
            good = np.flatnonzero(~np.isin(wanted, list(self.store.bad)))
            images = images[_there(good, images)]
            indices, positions = indices[good], positions[good]
        targets = self.store.targets[_there(indices, self.store.targets)]
        return Batch(
            images, targets, torch.from_numpy(indices), torch.from_numpy(positions), bad, plan
        )


def _there(indices: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """``indices`` on the device of ``tensor``."""
    return torch.from_numpy(indices).to(tensor.device, non_blocking=True)


def apply(
    where: str,
    loader: Loader,
    *,
    device: torch.device,
    visible: bool = True,
) -> Loader | CachedLoader:
    """``loader``, or one that does its work from memory, as ``where`` (``--cache``) says.

    Its data set must have its transform. ``visible``: show the progress of reading.

    Raises:
        OptionError: the pictures can't be kept as asked for.
        DataError: one can't be read, and the data set says that this is an error.
    """
    dataset = loader.dataset
    augment = dataset.transform if isinstance(dataset.transform, BatchAugment) else None
    by_batch = augment.pads if augment else not dataset.is_train
    if where == "auto":
        where = "none"
        if by_batch and _is_small(dataset.source):
            where = "device" if device.type == "cuda" else "ram"
    if where == "none":
        return loader
    if where == "device" and not by_batch:
        raise OptionError("cache", "device needs crops that move whole pixels (--input-size 32 or "
                          "less, or --src): use ram")  # fmt: skip
    prepare = _preparation(dataset) if by_batch else decode_tensor
    if prepare is None:
        by_batch, prepare = False, decode_tensor
    _check_memory(dataset.source)
    pictures, targets, bad = _read_all(dataset, prepare, visible)
    shapes = {p.shape for p in pictures if p is not None}
    if by_batch and len(shapes) == 1:
        images = torch.zeros(len(pictures), *shapes.pop(), dtype=torch.uint8)
        for image, picture in zip(images, pictures, strict=True):
            if picture is not None:
                image.copy_(picture)
        there = device if where == "device" else torch.device("cpu")
        images = images.to(there)
        if augment is not None:
            images = augment.padded(images)
        store = Store(images, torch.from_numpy(targets).to(there), bad)
        return CachedLoader(store, loader, augment, alter=there.type == device.type)
    if where == "device":
        raise OptionError("cache", "device needs pictures of one size: use ram")
    dataset.source = MemorySource(dataset.source, pictures, targets)
    return loader


def _preparation(dataset: ImageDataset) -> Callable[[Any], torch.Tensor] | None:
    """From a source's picture to the uint8 one that is kept; None where each time differs."""
    if not isinstance(dataset.transform, BatchAugment):
        return lambda picture: dataset.transform(decode(picture))
    interpolation = dataset.transform.options.train_interpolation
    if interpolation == "random":
        return None
    shrink = partial(resize_short_side, size=dataset.transform.size, interpolation=interpolation)
    return lambda picture: shrink(decode_tensor(picture))


def _is_small(source: Source) -> bool:
    """Whether all pictures seem to be of one small size, and few enough."""
    inner = source.source if isinstance(source, Subset) else source
    if isinstance(inner, ArraySource):
        side, sizes = max(inner.images.shape[1:3]), {inner.images.shape[1:3]}
    elif isinstance(inner, FileSource):
        numbers = np.linspace(0, len(source) - 1, min(PROBES, len(source))).astype(int)
        sizes = {_size_of(source.open(number)) for number in numbers}
        side = max(max(size) for size in sizes)
    else:
        return False
    return len(sizes) == 1 and 0 < side <= SMALL_SIDE and len(source) * 3 * side**2 <= SMALL_SET


def _size_of(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # Pillow raises almost anything; whoever reads the picture says it
        return 0, 0


def _check_memory(source: Source) -> None:
    """Raise OptionError if some pictures tell that all of them won't fit."""
    numbers = np.linspace(0, len(source) - 1, min(PROBES, len(source))).astype(int)
    sizes = []
    for number in numbers:
        try:
            sizes.append(decode_tensor(source.read(number)[0]).numel())
        except (BadPictureError, OSError):
            continue
    # Twice: as they are read, and as they are kept.
    needed = 2 * len(source) * sum(sizes) / max(len(sizes), 1)
    there = available_memory()
    if there is not None and needed > there:
        raise OptionError(
            "cache",
            f"{len(source)} decoded pictures need about {needed / 2**30:.1f} GiB, "
            f"{there / 2**30:.1f} GiB of memory are free: use none",
        )


def available_memory() -> int | None:
    """Bytes of host memory that are free for programs; None where the system doesn't tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _read_all(
    dataset: ImageDataset, prepare: Callable[[Any], torch.Tensor], visible: bool
) -> tuple[list[torch.Tensor | None], np.ndarray, dict[int, str]]:
    """All pictures (None: can't be read), their labels, and the reasons of the unreadable ones."""

    def read(index: int) -> tuple[torch.Tensor | str, int]:
        try:
            picture, target = dataset.source.read(index)
            return prepare(picture), target
        except (BadPictureError, OSError) as error:
            return f"{dataset.sample_id(index)}: {error}", 0

    pictures: list[torch.Tensor | None] = []
    targets = np.zeros(len(dataset), dtype=np.int64)
    bad: dict[int, str] = {}
    bar = ProgressBar("cache", len(dataset), visible=visible)
    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        for index, (picture, target) in enumerate(pool.map(read, range(len(dataset)))):
            targets[index] = target
            if isinstance(picture, str):
                bad[index] = picture
                pictures.append(None)
                if dataset.on_bad_image == "error":
                    bar.close()
                    raise DataError(
                        f"{picture} (mend or remove the file, or add --on-bad-image skip)"
                    )
            else:
                pictures.append(picture)
            bar.to(index + 1)
    bar.close()
    if len(bad) == len(pictures):
        raise DataError(f"{next(iter(bad.values()))} (no picture could be read)")
    return pictures, targets, bad
