"""``--cache disk``: decoded images in a file, so that each is decoded once for all epochs and runs.

Training images are kept with a short side of at most ``side`` pixels and crops are taken from
those, in the first epoch too and for images that found no room: pixels follow from ``side`` alone,
not from what the file holds. Of an image that is evaluated the crop is kept that the model sees, so
its pixels are those of the original.
"""

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from augmentation.protocol import Form, Transform
from augmentation.transforms import CentreCrop
from errors import OptionError, os_error_text
from pipeline.image_file import (
    MISSING,
    MOST_IMAGE_BYTES,
    MOST_IMAGES,
    ROW_BYTES,
    SUFFIX,
    DamagedError,
    ImageFile,
    Row,
    in_use,
)
from pipeline.kept_pixels import estimated_bytes, exact_pixels, key_of, small_pixels
from pipeline.loader import Loader
from pipeline.sources.base import Source, Subset, Target, target_of

logger = logging.getLogger(__name__)

GB = 1e9
FREE_SHARE = 0.1  # of the free disk space stays free: others write there too

# What the processes tell each other, numbers of a shared tensor.
_DAMAGED, _ERROR, _FULL = range(3)
_LIMIT, _DISK = 1, 2  # why it is full


@dataclass(frozen=True)
class DiskOptions:
    """Where decoded images are kept, and how."""

    folder: str
    """Empty: ``~/.cache/decoded-images``, or in $XDG_CACHE_HOME."""
    limit: int
    """Bytes of all files in the folder."""
    side: int
    """Training images are kept with a short side of at most so many pixels; 0: as they are."""
    scaled: bool = True
    """Whether large JPEG files are decoded at a part of their size (``--jpeg-scaling``)."""


class KeptCrop(Transform):
    """The transform of images that are kept as the model sees them."""

    decode_as = "tensor"

    def __init__(self, form: Form) -> None:
        self.form = form

    def apply(self, image: torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        return image


def disk_cached(loader: Loader, options: DiskOptions, *, visible: bool = True) -> Loader:
    """``loader`` with the images of its data set kept on disk.

    Args:
        loader: its data set has its transform.
        options: where and how.
        visible: say what doesn't fit.

    Raises OptionError where the folder can't be used.
    """
    dataset = loader.dataset
    transform, form = dataset.transform, dataset.transform.form
    if isinstance(transform, CentreCrop):
        prepare = partial(exact_pixels, transform=transform)
        how = repr(transform.preprocessing)
        needed = len(dataset) * (form.pixel_bytes * math.prod(transform.size) + ROW_BYTES)
        transform = KeptCrop(form)
    else:
        background, side, scaled = transform.background, options.side, options.scaled
        prepare = partial(small_pixels, side=side, background=background, scaled=scaled, form=form)
        how = f"side {side} on {background}, scaled {scaled}"
        needed = estimated_bytes(dataset.source, side, form)
    inner, _ = whole_of(dataset.source)
    kept = None
    if not inner.decoded and len(inner) < MOST_IMAGES:
        kept = KeptImages(dataset.source, how, options, needed, form)
        if visible and (text := kept.shortage(needed)):
            logger.warning("%s", text)
    source = DiskSource(dataset.source, prepare, kept)
    changed = dataset.with_source(source).with_transform(transform)
    return Loader(changed, loader.sampler, loader.settings)


class DiskSource(Source):
    """Another source's images, decoded, from a file that is filled as they are read.

    Args:
        source: where the images come from.
        prepare: makes of what ``source`` gives the pixels that are kept, uint8 or uint16
            (H, W, C).
        images: the file; None: everything is made anew, as of a source that is decoded already.
    """

    decoded = True

    def __init__(
        self, source: Source, prepare: Callable[[Any], np.ndarray], images: "KeptImages | None"
    ) -> None:
        self.source = source
        self.prepare = prepare
        self.images = images
        self.classes, self.targets = source.classes, source.targets
        self.groups, self.findings = source.groups, source.findings

    def __len__(self) -> int:
        return len(self.source)

    def open(self, index: int) -> np.ndarray:
        return self.read(index)[0]

    def read(self, index: int) -> tuple[np.ndarray, Target]:
        if self.images is None:
            image, label = self.source.read(index)
            return self.prepare(image), label
        number = int(self.images.numbers[index])
        row, seen = self.images.row(number)
        pixels = self.images.pixels(number, row)
        if pixels is not None:
            return pixels, row.label if self.targets is None else target_of(self.targets, index)
        stamp = self.images.stamp(number)  # a file that changes from here on is seen next time
        image, label = self.source.read(index)
        pixels = self.prepare(image)
        # Several labels are known beforehand, and so nobody asks for them here.
        self.images.add(number, pixels, label if isinstance(label, int) else 0, stamp, seen)
        return pixels, label

    def sample_id(self, index: int) -> str:
        return self.source.sample_id(index)

    def identity(self, index: int) -> str:
        return self.source.identity(index)

    def kept(self) -> str:
        return "" if self.images is None else self.images.description()

    def news(self) -> Iterator[str]:
        """What has changed on disk since the last call, a sentence each."""
        return iter(()) if self.images is None else self.images.news()


class KeptImages:
    """The file of a source's images and what bounds it.

    Args:
        source: the images; of a part of a set, the file is that of the set.
        how: what else their pixels follow from.
        options: where they are kept.
        needed: bytes that are expected.
        form: of the images.

    Raises OptionError.
    """

    def __init__(
        self, source: Source, how: str, options: DiskOptions, needed: int, form: Form
    ) -> None:
        self.source, self.numbers = whole_of(source)
        self.limit = options.limit
        self.folder = _folder(options.folder)
        key = key_of(self.source, how, form)
        path = self.folder / f"{key.hex()[:32]}{SUFFIX}"
        make_room(self.folder, path, needed, self.limit)
        try:
            self.file = ImageFile(path, key, len(self.source), form)
            if hasattr(os, "getuid") and os.stat(path).st_uid != os.getuid():
                raise OptionError("cache_dir", f"{path} is another user's: name another folder")
            with contextlib.suppress(OSError):
                os.utime(path)  # it was used now
        except OSError as error:
            raise OptionError("cache_dir", os_error_text(error, path)) from None
        except DamagedError as error:
            raise OptionError("cache_dir", str(error)) from None
        free = shutil.disk_usage(self.folder).free
        self.reserve = int(FREE_SHARE * free)
        self.room = min(self.limit - _used(self.folder), free - self.reserve)
        self._notes = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._said = [self._count(), 0, 0, 0]
        self._process = 0
        self._checked = bytearray()

    # --- in the processes that read ---------------------------------------------------------------

    def row(self, number: int) -> tuple[Row, bytes]:
        """What is known of an image, and the bytes of that."""
        try:
            row, seen = self.file.row(number)
        except OSError:
            return MISSING, b""
        if not row.offset and any(seen):
            self._notes[_DAMAGED] += 1
        return row, seen

    def pixels(self, number: int, row: Row) -> np.ndarray | None:
        """The pixels of an image; None if they aren't there, are damaged, or its file is another
        by now."""
        if not row.offset:
            return None
        if self._process != os.getpid():
            self._process, self._checked = os.getpid(), bytearray(len(self.source))
        if not self._checked[number]:
            # Once is enough, and on network disks this takes a while.
            if self.stamp(number) != row.stamp:
                return None
            self._checked[number] = 1
        try:
            return self.file.pixels(row)
        except (OSError, DamagedError):
            self._notes[_DAMAGED] += 1
            return None

    def stamp(self, number: int) -> int:
        """That of the image's file; 0 if there is none: whoever reads it says so."""
        try:
            return self.source.stamp(number)
        except OSError:
            return 0

    def add(self, number: int, pixels: np.ndarray, label: int, stamp: int, seen: bytes) -> None:
        """Keep an image, if there is room; ``seen`` is what ``row`` gave for it."""
        closed = self._notes[_ERROR] or self._notes[_FULL] or not self.file.writable
        if closed or pixels.nbytes > MOST_IMAGE_BYTES:
            return
        try:
            if _used(self.folder) + pixels.nbytes > self.limit:
                self._notes[_FULL] = _LIMIT
            elif shutil.disk_usage(self.folder).free - pixels.nbytes < self.reserve:
                self._notes[_FULL] = _DISK
            else:
                self.file.write(number, pixels, label, stamp, seen)
        except OSError as error:
            self._notes[_ERROR] = error.errno or errno.EIO

    # --- in words ---------------------------------------------------------------------------------

    def _count(self) -> int:
        """How many of the images are there."""
        with contextlib.suppress(OSError):
            return int(np.count_nonzero(self.file.there()[self.numbers]))
        return 0

    def shortage(self, needed: int) -> str:
        """What to say where the ``needed`` bytes of all images don't fit; empty where they do."""
        more = needed - self.file.size()
        if not self.file.writable:
            return f"{self.file.path} can't be written to: what it lacks is read from the files"
        if more <= self.room:
            return ""
        bound = f"--cache-gb allows {self.limit / GB:.3g}"
        if self.room < self.limit - _used(self.folder):
            bound = f"{self.folder} has room for {size_text(max(self.room, 0))} more"
        return (
            f"disk cache: {len(self.numbers):,} images need about {size_text(needed)}, {bound}: "
            "the others are read from their files in each epoch (or take a smaller --cache-side)"
        )

    def description(self) -> str:
        """How full it is."""
        try:
            size = size_text(self.file.size())
        except OSError as error:
            return f"disk cache: {os_error_text(error, self.file.path)}"
        # Rounded down: 100 % is said of all.
        images = len(self.numbers)
        share = 100 * self._count() // images
        return f"disk cache of {images:,} images {share} % filled, {size} in {self.folder}"

    def news(self) -> Iterator[str]:
        """What has changed since the last call, a sentence each."""
        count = self._count()
        if count != self._said[0]:
            yield self.description()
        damaged, error, full = self._notes.tolist()
        if damaged > self._said[1]:
            yield (
                f"disk cache: {damaged - self._said[1]} times an image was damaged there, and was "
                "decoded anew: check the disk"
            )
        if error and not self._said[2]:
            text = os_error_text(OSError(error, os.strerror(error)), self.file.path)
            yield f"disk cache: {text}; no more is written, the others are read from their files"
        if full and not self._said[3]:
            what = "--cache-gb is used up" if full == _LIMIT else f"{self.folder} is nearly full"
            yield f"disk cache: {what}: the other images are read from their files"
        self._said = [count, damaged, error, full]


def size_text(count: int) -> str:
    """A number of bytes, in the unit of --cache-gb or a part of it."""
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{1000 * count / GB:.1f} MB"


# --- where and whose ------------------------------------------------------------------------------


def _folder(given: str) -> Path:
    """The folder of the files, which is made if it isn't there. Raises OptionError."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given or os.path.join(base, "decoded-images")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OptionError("cache_dir", os_error_text(error, folder)) from None
    return folder


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Last use in seconds, size in bytes and path of each file of images."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime, status.st_size, Path(entry.path)


def _used(folder: Path) -> int:
    """Bytes of all files of images. Raises OSError."""
    return sum(size for _, size, _ in _files(folder))


def make_room(folder: Path, own: Path, needed: int, limit: int) -> None:
    """Remove files longest unused, but for ``own`` and those in use, until ``needed`` bytes fit."""
    found = sorted(_files(folder))
    total = needed + sum(size for _, size, path in found if path != own)
    for _, size, path in found:
        if total <= limit:
            return
        with contextlib.suppress(OSError):  # another user's
            if path != own and not in_use(path):
                path.unlink()
                total -= size


def whole_of(source: Source) -> tuple[Source, np.ndarray]:
    """The source of which this is a part, and the numbers of the part's images there.

    All parts share one file, however they were drawn.
    """
    numbers = np.arange(len(source))
    while isinstance(source, Subset):
        numbers, source = source.indices[numbers], source.source
    return source, numbers
