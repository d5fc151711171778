"""``--cache``: no decoding after the first time, and small images by whole batches.

Images of one size whose crop moves whole pixels (CIFAR's kind, ``--src``) are kept as one uint8
tensor, in host memory or on the device, and leave it by the batch, without workers
(``CachedLoader``). Others are kept as they are (``MemorySource``) and take the usual way. In both
cases the model sees the pixels it would have seen without a cache, but for crops of large JPEG
files that would have been decoded at a part of their size (``--jpeg-scaling``).
"""

from collections.abc import Iterator

import numpy as np
import torch

from augmentation.protocol import RGB, Plan, StoreTransform, Transform
from errors import OptionError
from pipeline.bands import decode_bands
from pipeline.dataset import Batch, opened
from pipeline.decoding import decode_tensor
from pipeline.loader import Loader
from pipeline.memory import MemorySource, Store, check_memory, is_small, read_all


def check_crops(transform: Transform) -> None:
    """Raise OptionError unless the device can cut the crops of ``transform``."""
    if transform.for_store() is None:
        raise OptionError(
            "cache",
            "device needs crops that move whole pixels (--input-size 32 or less, or --src; neither "
            "--train-crop-mode rkrc nor rkrr) and a fixed --train-interpolation: use ram",
        )


def apply_cache(
    where: str, loader: Loader, *, device: torch.device, visible: bool = True
) -> "Loader | CachedLoader":
    """``loader``, or one that does its work from memory, as ``where`` (``--cache``) says.

    Args:
        where: none, ram, device, or auto, which caches small images alone.
        loader: its data set has its transform.
        device: that of the model.
        visible: show how far reading is.

    Raises:
        OptionError: the images can't be kept as asked for.
        DataError: one can't be read, and the data set says that this is an error.
    """
    dataset = loader.dataset
    transform = dataset.transform.for_store()
    if where == "auto":
        where = "none"
        if transform is not None and is_small(dataset.source):
            where = "device" if device.type == "cuda" else "ram"
    if where == "none":
        return loader
    if where == "device":
        check_crops(dataset.transform)
    check_memory(dataset.source, dataset.transform.form)
    background, form = dataset.transform.background, dataset.transform.form
    if transform is None and form == RGB:
        decoded = read_all(dataset, lambda image: decode_tensor(image, background), visible)
    elif transform is None:
        decoded = read_all(dataset, lambda image: decode_bands(image, form, background), visible)
    else:
        decoded = read_all(dataset, lambda image: transform.keep(opened(image, transform)), visible)
    if transform is not None and decoded.in_one_size(transform.size):
        there = device if where == "device" else torch.device("cpu")
        images = transform.padded(decoded.stacked().to(there))
        store = Store(images, torch.from_numpy(decoded.targets).to(there), decoded.bad)
        return CachedLoader(store, loader, transform, alter=there.type == device.type)
    if where == "device":
        raise OptionError("cache", "device needs images of one size: use ram")
    source = MemorySource(dataset.source, decoded.images, decoded.targets)
    return Loader(dataset.with_source(source), loader.sampler, loader.settings)


class CachedLoader:
    """Batches of a ``Store``, made where it is; what ``Loader`` gives, without workers.

    Args:
        store: the images, with their margins.
        loader: the one whose batches these are.
        transform: crops and plans.
        alter: also does flips and the policy, many batches at a time, which spares small images
            most of what an operation costs besides its work.
    """

    CHUNK = 1024  # images
    cached = True
    from_store = True
    num_workers = 0

    def __init__(
        self, store: Store, loader: Loader, transform: StoreTransform, *, alter: bool
    ) -> None:
        self.store = store
        self.dataset = loader.dataset
        self.sampler = loader.sampler
        self.settings = loader.settings
        self.batch_size = loader.batch_size
        self.transform = transform
        self.alter = alter
        self._use = np.arange(len(store.images))
        if store.bad and loader.dataset.is_train:
            # The next readable one takes a bad one's place, as without a cache.
            good = np.setdiff1d(self._use, list(store.bad))
            self._use = good[np.searchsorted(good, self._use) % len(good)]

    def introduction(self) -> str:
        """Where images come from, for the log."""
        images = self.store.images
        return f"{images.numel() / 2**20:.1f} MiB of images in memory of {images.device}"

    def __len__(self) -> int:
        batches, rest = divmod(len(self.sampler), self.batch_size)
        return batches + (rest > 0 and not self.settings.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        indices, positions = self.sampler.share()
        end = len(indices) - (len(indices) % self.batch_size if self.settings.drop_last else 0)
        at_once = self.batch_size * (max(1, self.CHUNK // self.batch_size) if self.alter else 1)
        for start in range(0, end, at_once):
            part = slice(start, min(start + at_once, end))
            yield from self._batches(indices[part], positions[part])

    def _batches(self, wanted: np.ndarray, positions: np.ndarray) -> Iterator[Batch]:
        indices, epoch = self._use[wanted], self.sampler.epoch
        images = self.transform.take(self.store.images, indices, epoch, positions)
        plan = self.transform.plan(epoch, positions)
        if self.alter and plan is not None:
            images, plan = self.transform.alter(images, plan), plan.altered()
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
            images = images[_on_device_of(images, good)]
            indices, positions = indices[good], positions[good]
        targets = self.store.targets[_on_device_of(self.store.targets, indices)]
        if targets.ndim == 2:
            targets = targets.float()
        return Batch(
            images, targets, torch.from_numpy(indices), torch.from_numpy(positions), bad, plan
        )


def _on_device_of(tensor: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    """``indices`` as a tensor beside ``tensor``; the device isn't waited for."""
    return torch.from_numpy(indices).to(tensor.device, non_blocking=True)
