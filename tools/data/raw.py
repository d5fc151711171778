"""Decoded images in one file for each part, which ``--data-set raw/NAME`` reads."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from augmentation.bands import resized_bands
from augmentation.protocol import RGB, Form
from augmentation.windows import short_side
from errors import UserError
from pipeline.bands import decode_bands
from pipeline.dataset import ImageDataset
from pipeline.decoding import decode, naming_lack_of_memory
from pipeline.disk_cache import size_text, whole_of
from pipeline.image_file import SUFFIX, DamagedError, ImageFile
from pipeline.kept_pixels import estimated_bytes, key_of, rows_of, small_pixels
from pipeline.limits import BadImageError
from pipeline.sources.base import Source, Target
from pipeline.sources.raw import INFO, LIST_SUFFIX

SIDE = 256  # pixels of the short side, where none is given: for inputs of 224


class RawImage(NamedTuple):
    """An image as it goes into the file, or why it doesn't."""

    pixels: np.ndarray
    """uint8 or uint16 (H, W, C)."""
    name: str
    label: Target
    """Number of the class, or which classes it has, (K,)."""
    problem: str = ""


def _exactly(encoded: Any, side: int, background: str, form: Form) -> np.ndarray:
    """An image of evaluation as it goes into the file. Raises BadImageError."""
    if form == RGB:
        image = decode(encoded, background)
        with naming_lack_of_memory():
            if side and min(image.size) > side:
                image = image.resize(short_side(image.size, side), Image.Resampling.BICUBIC)
            return np.array(image)
    bands = decode_bands(encoded, form, background)
    with naming_lack_of_memory():
        height, width = bands.shape[1:]
        if side and min(height, width) > side:
            bands = resized_bands(bands, short_side((width, height), side))
        return rows_of(bands)


class RawWriter:
    """Writes a part: its images, labels and names.

    Args:
        folder: an empty one.
        part: train or val.
        source: the images, of which some may be left out.
        side: their short side.
        form: of the images.
    """

    def __init__(
        self, folder: Path, part: str, source: Source, side: int, form: Form = RGB
    ) -> None:
        self.folder, self.part = folder, part
        whole, numbers = whole_of(source)
        key = key_of(whole, f"raw {part}, side {side}, {zlib.crc32(numbers)}", form)
        self.file = ImageFile(folder / f"{part}{SUFFIX}", key, len(source), form)
        self.labels: list[Target] = []
        self.names: list[bytes] = []
        self.crc = 0

    @property
    def done(self) -> int:
        """Images that are written."""
        return len(self.labels)

    def add(self, image: RawImage) -> None:
        """Append an image."""
        number = self.done
        _, seen = self.file.row(number)
        self.file.write(number, image.pixels, _in_row(image.label), 0, seen)
        self.labels.append(image.label)
        self.names.append(os.fsencode(image.name))

    def close(self) -> None:
        """Write labels and names, and read everything back. Raises OSError and UserError."""
        content = _stored(self.labels) + b"".join(name + b"\0" for name in self.names)
        path = self.folder / f"{self.part}{LIST_SUFFIX}"
        path.write_bytes(content)
        os.chmod(self.file.path, path.stat().st_mode)  # others may read it too
        self.crc = zlib.crc32(content)
        self.file.sync()
        try:
            for number in range(self.done):
                row, _ = self.file.row(number)
                if row.label != _in_row(self.labels[number]) or not row.offset:
                    raise DamagedError
                self.file.pixels(row)
        except DamagedError:
            raise UserError(
                f"{self.file.path} doesn't hold what was written to it: check the disk"
            ) from None

    def info(self) -> dict[str, Any]:
        """The part's entry in the folder's list."""
        return {"images": self.done, "crc": self.crc, "key": self.file.key.hex()}

    def abandon(self) -> None:
        """Nothing is open that has to be closed."""

    def summary(self, folder: Path) -> str:
        """What was written, in words; it lies in ``folder`` by now."""
        size = (folder / self.file.path.name).stat().st_size
        return f"{self.part}: {self.done} images in one file, {size / 2**20:.1f} MiB"


def _in_row(label: Target) -> int:
    """The label beside an image's pixels; of several the list alone has them."""
    return 0 if np.ndim(label) else int(label)


def _stored(labels: Sequence[Target]) -> bytes:
    """All labels as ``pipeline.sources.raw.RawSource`` reads them."""
    if labels and np.ndim(labels[0]):
        return np.packbits(np.stack(labels), axis=1).tobytes()
    return np.array(labels, dtype="<i8").tobytes()


@dataclass(frozen=True)
class Raw:
    """Decoded images in one file for each part."""

    side: int
    """Pixels that they keep of their short side, at most; 0: all."""
    background: str
    """What transparent ones are composited on."""
    scaled: bool
    """Whether large JPEG files are decoded at a part of their size."""
    form: Form = RGB
    """Of the images."""

    data_set = "raw"

    def check(self, parts: Mapping[str, ImageDataset], folder: Path) -> None:
        """Raise UserError where the images need more space than is free beside ``folder``."""
        needed = sum(estimated_bytes(part.source, self.side, self.form) for part in parts.values())
        there = next(path for path in folder.absolute().parents if path.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise UserError(
                f"--output-dir: the images need about {size_text(needed)}, {size_text(free)} are "
                f"free on the disk of {folder}: choose another disk, or a smaller --short-side"
            )

    def writer(self, folder: Path, part: str, dataset: ImageDataset) -> RawWriter:
        return RawWriter(folder, part, dataset.source, self.side, self.form)

    def read(self, dataset: ImageDataset, index: int) -> RawImage:
        """An image as it is kept.

        Training images are what ``--cache disk`` keeps. Others are resized as evaluation does it:
        where it resizes to that side, with bicubic interpolation, it sees the pixels of the
        originals.
        """
        try:
            encoded, label = dataset.source.read(index)
            if dataset.is_train:
                how = {"scaled": self.scaled, "form": self.form}
                pixels = small_pixels(encoded, self.side, self.background, **how)
            else:
                pixels = _exactly(encoded, self.side, self.background, self.form)
            return RawImage(pixels, dataset.source.identity(index), label)
        except (BadImageError, OSError) as error:
            empty = np.zeros((0, 0, 3), dtype=np.uint8)
            return RawImage(empty, "", -1, f"{dataset.sample_id(index)}: {error}")

    def write_list(
        self, folder: Path, writers: Sequence[RawWriter], classes: Sequence[str]
    ) -> None:
        """The list of the parts."""
        parts = {writer.part: writer.info() for writer in writers}
        info = {"side": self.side, "classes": list(classes), "parts": parts}
        if np.ndim(writers[0].labels[0]):
            info["several"] = True  # labels of an image
        (folder / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")
