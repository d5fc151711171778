"""raw/NAME: decoded images in one file for each part, as ``tools.data pack --format raw`` does."""

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import bounded
from errors import DataError, OptionError, os_error_text
from pipeline.image_file import MOST_IMAGES, SUFFIX, DamagedError, ImageFile
from pipeline.limits import BadImageError
from pipeline.sources.base import Factory, Source, data_root, read_json, refuse_val_fraction
from pipeline.sources.names import Names
from pipeline.sources.shard_index import MOST_CLASSES

if TYPE_CHECKING:
    from config import DataOptions

INFO = "_raw.json"
LIST_SUFFIX = ".list"
MOST_LIST = 1 << 30  # bytes of the labels and names of a part


class RawSource(Source):
    """The images of a part in ``folder``.

    Beside ``PART.images`` (``pipeline.image_file``) lies ``PART.list``: all labels, and then all
    names, each with a NUL byte behind it. A label has 8 bytes; where ``several`` are possible, an
    image has a bit for each class, as ``numpy.packbits`` writes them.

    Raises DataError for files that don't belong together, or are damaged.
    """

    decoded = True

    def __init__(
        self, folder: Path, part: str, entry: Any, classes: list[str], *, several: bool = False
    ) -> None:
        self.path = folder / f"{part}{SUFFIX}"
        self.classes = classes
        count, crc, key = (_field(folder, part, entry, name) for name in ("images", "crc", "key"))
        try:
            content = bounded.read_bytes(folder / f"{part}{LIST_SUFFIX}", MOST_LIST)
            self.images = ImageFile(self.path)
        except OSError as error:
            raise DataError(os_error_text(error, self.path)) from None
        except DamagedError as error:
            raise DataError(str(error)) from None
        begin = count * (-(-len(classes) // 8) if several else 8)  # of the names
        whole = zlib.crc32(content) == crc and content.endswith(b"\0")
        whole = whole and content.count(b"\0", begin) == count
        if not whole or self.images.key.hex() != key or not count <= self.images.count:
            raise DataError(
                f"{folder}: {part}{SUFFIX}, {part}{LIST_SUFFIX} and {INFO} don't belong together, "
                "or are damaged: pack the set again"
            )
        self.names = Names(content[begin:-1].split(b"\0"))
        if several:
            bits = np.frombuffer(content, dtype=np.uint8, count=begin).reshape(count, -1)
            self.targets = np.unpackbits(bits, axis=1, count=len(classes))
            return
        self.targets = np.frombuffer(content, dtype="<i8", count=count).astype(np.int64)
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(classes)))
        if len(wrong):
            raise DataError(
                f"{self.sample_id(wrong[0])}: label {self.targets[wrong[0]]} is none of the "
                f"{len(classes)} classes"
            )

    def open(self, index: int) -> np.ndarray:
        try:
            row, _ = self.images.row(int(index))
            if not row.offset:
                raise DamagedError
            return self.images.pixels(row)
        except OSError as error:
            raise BadImageError(os_error_text(error)) from None
        except DamagedError:
            raise BadImageError("damaged in this file: pack the set again") from None

    def sample_id(self, index: int) -> str:
        return f"{self.path}:{self.identity(index)}"

    def identity(self, index: int) -> str:
        return os.fsdecode(self.names[int(index)])

    def version(self) -> str:
        return self.images.key.hex()


def _field(folder: Path, part: str, entry: Any, name: str) -> Any:
    """A field of a part in the folder's list. Raises DataError."""
    kind = str if name == "key" else int
    value = entry.get(name) if isinstance(entry, dict) else None
    if type(value) is not kind or (name == "images" and not 0 < value < MOST_IMAGES):
        raise DataError(f"{folder / INFO}: no good {name!r} of the part {part}: pack the set again")
    return value


def raw_images(name: str) -> Factory:
    """The factory of the parts of the folder ``--data-path``."""
    return _part_of


def _part_of(is_train: bool, data: "DataOptions", seed: int) -> Source:
    refuse_val_fraction(data, "a packed set")
    root = data_root(data)
    if not (root / INFO).exists():
        raise OptionError(
            "data_path",
            f"{root} has no {INFO}: python -m tools.data pack --format raw writes such a folder",
        )
    info = read_json(root / INFO)
    classes = info.get("classes") if isinstance(info, dict) else None
    named = isinstance(classes, list) and 0 < len(classes) <= MOST_CLASSES
    if not named or not all(isinstance(c, str) for c in classes):
        raise DataError(f"{root / INFO}: 'classes' is no list of names: pack the set again")
    part = "train" if is_train else "val"
    parts = info.get("parts")
    entry = parts.get(part) if isinstance(parts, dict) else None
    return RawSource(root, part, entry, classes, several=info.get("several") is True)
