"""Decoded images in memory: as they are, or ready in one tensor; and whether they fit."""

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from augmentation.protocol import RGB, Form
from errors import DataError, OptionError
from pipeline.bands import tensor_of
from pipeline.dataset import ImageDataset
from pipeline.decoding import naming_lack_of_memory
from pipeline.formats import open_image
from pipeline.limits import BadImageError
from pipeline.progress import ProgressBar
from pipeline.sources.base import ArraySource, FileSource, Source, Subset, Target
from utils import cores

# What ``--cache auto`` takes for small.
SMALL_SIDE = 96  # pixels
SMALL_SET = 2 << 30  # bytes
PROBES = 32  # images that are looked at before all are read
THREADS = 8  # that decode, at most


@dataclass
class Store:
    """All images of a data set in one tensor."""

    images: torch.Tensor
    """(N, C, H, W) uint8 or uint16, with the margins that crops need."""
    targets: torch.Tensor
    """(N,) int64 or (N, K) uint8, on the same device."""
    bad: dict[int, str]
    """"path: reason" of each image that can't be read, by number; its pixels are zero."""


class MemorySource(Source):
    """Another source's images, decoded, in memory that workers share.

    Args:
        source: where the images came from.
        images: uint8 or uint16 (C, H, W) each, of any sizes; None for one that can't be read.
        targets: (N,) int64, or (N, K) uint8.
    """

    decoded = True

    def __init__(
        self, source: Source, images: Sequence[torch.Tensor | None], targets: np.ndarray
    ) -> None:
        self.source = source
        self.classes = source.classes
        self.targets = targets
        self.shapes = np.array([(0, 0) if p is None else p.shape[1:] for p in images])
        first = next(image for image in images if image is not None)
        self.channels = len(first)
        sizes = self.channels * self.shapes.prod(1)
        ends = np.cumsum(sizes)
        self.starts = ends - sizes
        self.bytes_in_memory = int(ends[-1]) * first.element_size()
        self.pixels = torch.empty(int(ends[-1]), dtype=first.dtype).share_memory_()
        for index, image in enumerate(images):
            if image is not None:
                self._pixels_of(index).copy_(image.permute(1, 2, 0))

    def _pixels_of(self, index: int) -> torch.Tensor:
        """(H, W, C), a part of ``pixels``."""
        shape = (*self.shapes[index].tolist(), self.channels)
        start = int(self.starts[index])
        return self.pixels[start : start + math.prod(shape)].view(shape)

    def open(self, index: int) -> Any:
        # One that couldn't be read is tried again, for the reason.
        readable = self.shapes[index].all()
        return self._pixels_of(index).numpy() if readable else self.source.open(index)

    def sample_id(self, index: int) -> str:
        return self.source.sample_id(index)

    def kept(self) -> str:
        return f"{self.bytes_in_memory / 2**20:.1f} MiB of images in ram"


@dataclass
class Decoded:
    """All images of a data set, as one pass over its files gives them."""

    images: list[torch.Tensor | None]
    """uint8 or uint16 (C, H, W) each; None for one that can't be read."""
    targets: np.ndarray
    """(N,) int64, or (N, K) uint8."""
    bad: dict[int, str]
    """"path: reason" of each image that can't be read, by number."""

    def in_one_size(self, size: tuple[int, int]) -> bool:
        """Whether all images have the same shape, just around ``size`` (height, width)."""
        shapes = {image.shape for image in self.images if image is not None}
        if len(shapes) != 1:
            return False
        over = [length - side for length, side in zip(shapes.pop()[1:], size, strict=True)]
        return min(over) == 0

    def stacked(self) -> torch.Tensor:
        """(N, C, H, W); zeros for those that can't be read."""
        first = next(image for image in self.images if image is not None)
        images = torch.zeros(len(self.images), *first.shape, dtype=first.dtype)
        for place, image in zip(images, self.images, strict=True):
            if image is not None:
                place.copy_(image)
        return images


def read_all(
    dataset: ImageDataset, prepare: Callable[[Any], torch.Tensor], visible: bool
) -> Decoded:
    """Read and ``prepare`` every image; ``visible``: show how far it is.

    Raises DataError for an image that can't be read, where the data set says that this is an
    error, and where no image can.
    """

    def read(index: int) -> tuple[torch.Tensor | str, Target]:
        try:
            image, target = dataset.source.read(index)
            with naming_lack_of_memory():
                return prepare(image), target
        except (BadImageError, OSError) as error:
            return f"{dataset.sample_id(index)}: {error}", 0

    known = dataset.targets
    labels = np.zeros(len(dataset), dtype=np.int64) if known is None else np.zeros_like(known)
    decoded = Decoded([], labels, {})
    bar = ProgressBar("cache", len(dataset), unit="image", visible=visible)
    pool = ThreadPoolExecutor(max_workers=min(THREADS, cores()))
    try:
        for index, (image, target) in enumerate(pool.map(read, range(len(dataset)))):
            decoded.targets[index] = target
            decoded.images.append(None if isinstance(image, str) else image)
            if isinstance(image, str):
                decoded.bad[index] = image
                if dataset.on_bad_image == "error":
                    raise DataError(
                        f"{image} (mend or remove the file, or add --on-bad-image skip)"
                    )
            bar.to(index + 1)
    finally:
        bar.close()
        # Whoever leaves doesn't wait for the others, which storage may hold.
        pool.shutdown(wait=False, cancel_futures=True)
    if len(decoded.bad) == len(dataset):
        raise DataError(f"{next(iter(decoded.bad.values()))} (no image could be read)")
    return decoded


def probes(source: Source) -> np.ndarray:
    """Numbers of a few images from all over the source."""
    return np.linspace(0, len(source) - 1, min(PROBES, len(source))).astype(int)


def is_small(source: Source) -> bool:
    """Whether all images seem to be of one small size, and few enough."""
    inner = source.source if isinstance(source, Subset) else source
    if isinstance(inner, ArraySource):
        side, sizes = max(inner.images.shape[1:3]), {inner.images.shape[1:3]}
    elif isinstance(inner, FileSource):
        sizes = {size_of(source.open(number)) for number in probes(source)}
        side = max(max(size) for size in sizes)
    else:
        return False
    return len(sizes) == 1 and 0 < side <= SMALL_SIDE and len(source) * 3 * side**2 <= SMALL_SET


def size_of(image: Any) -> tuple[int, int]:
    """Width and height of what ``Source.open`` gives, by its header; zeros where it has none."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    if isinstance(image, Image.Image):
        return image.size
    try:
        file = io.BytesIO(image) if isinstance(image, bytes) else image
        with open_image(file) as opened:
            return opened.size
    except Exception:  # Pillow raises almost anything; whoever reads the image says it
        return 0, 0


def check_memory(source: Source, form: Form = RGB) -> None:
    """Raise OptionError if a few images, decoded in ``form``, show that all of them won't fit."""
    sizes = []
    for number in probes(source):
        try:
            image = source.read(number)[0]
            sizes.append(tensor_of(image, form).nbytes)
        except (BadImageError, OSError):
            continue
    # Twice: as they are read, and as they are kept.
    needed = 2 * len(source) * sum(sizes) / max(len(sizes), 1)
    free = available_memory()
    if free is not None and needed > free:
        raise OptionError(
            "cache",
            f"{len(source)} decoded images need about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB of memory are free: use none",
        )


def available_memory() -> int | None:
    """Bytes of host memory that are free for programs; None where the system doesn't say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
