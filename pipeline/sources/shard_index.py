"""Where the images of a tar shard are."""

import logging
import math
import os
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import IO, NamedTuple

import numpy as np

import bounded
from errors import DataError, OptionError, shortened, shown
from pipeline.formats import EXTENSIONS
from pipeline.sources.labels import Labels
from pipeline.sources.shard_labels import ARRAYS, labels_of_sample, restored, stored
from utils import written_whole

logger = logging.getLogger(__name__)


MOST_CLASSES = 1_000_000
MOST_KEY = 1000  # bytes of the name of a sample
MOST_INDEX = 256 << 20  # bytes of an index file, and of what it holds when unpacked
MOST_DIRECTORY = 64 << 10  # bytes of the list of its arrays
MOST_LABEL = 1 << 20  # bytes of a .cls or .json
MOST_HEADER = 64 << 10  # bytes of a header of a tar file
SEVERAL = -1  # the target of an image that has any number of labels
_WHOLE = re.compile(r"[+-]?[0-9]+")
_LONG_NUMBER = re.compile(rb"[0-9]{100}")
_END = struct.Struct("<4s4H2LH")  # the last bytes of a zip file
_ZIP64_BYTES = 20  # before them, in one of another form
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What tarfile, zipfile and numpy raise for damage, beside types of their own.
# RuntimeError is zipfile's for entries that are encrypted.
_DAMAGE = (OSError, ValueError, ArithmeticError, LookupError, TypeError, EOFError, RuntimeError)
_DAMAGE += (SyntaxError, TokenError)
_DAMAGE += (tarfile.TarError, zipfile.BadZipFile, zlib.error)


Place = tuple[int, int, int, str]
"""Offset, size, label and key of an image."""


class ShardIndex(NamedTuple):
    """Where the images of a shard are."""

    places: np.ndarray
    """(N, 2) int64: offset and size in bytes."""
    targets: np.ndarray
    """(N,) int64."""
    keys: np.ndarray
    """(N,) bytes: names without extension."""
    shard_bytes: int
    """Size of the shard, which shows whether the index is its."""

    @classmethod
    def of(cls, rows: Sequence[Place], shard_bytes: int) -> "ShardIndex":
        """The index of rows of offset, size, label and key.

        Raises DataError for a key of more than ``MOST_KEY`` bytes.
        """
        keys = [os.fsencode(row[3]) for row in rows]
        long = next((key for key in keys if len(key) > MOST_KEY), None)
        if long is not None:
            raise DataError(
                f"sample {shown(long)} has a name of {len(long):,} bytes, {MOST_KEY:,} at most"
            )
        places = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        targets = np.array([row[2] for row in rows], dtype=np.int64)
        return cls(places, targets, np.array(keys, np.bytes_), shard_bytes)

    @classmethod
    def scan(cls, shard: Path) -> "ShardIndex":
        """The index made from the headers of the tar file, all of which are read.

        Raises DataError for a file that isn't a plain tar file, or lacks an image or label.
        """
        rows = [_place(*sample, _shard_label(*sample)) for sample in _samples(shard)]
        return cls.of(rows, shard.stat().st_size)

    @classmethod
    def scan_labelled(cls, shard: Path) -> "Labelled":
        """As :meth:`scan`, with any number of labels of each image."""
        rows, labels = [], []
        for sample in _samples(shard):
            rows.append(_place(*sample, SEVERAL))
            labels.append(labels_of_sample(*sample))
        return cls.of(rows, shard.stat().st_size), labels

    @classmethod
    def read(cls, shard: Path, *, there: bool = True) -> "ShardIndex | None":
        """The index beside ``shard``; None if there is none for a shard of its name and size.

        ``there``: the shard is a file already, whose size can be compared. Raises OptionError where
        images have any number of labels.
        """
        found = cls.read_labelled(shard, there=there)
        if found is None or found[1] is None:
            return found and found[0]
        raise several_labels(shard)

    @classmethod
    def read_labelled(cls, shard: Path, *, there: bool = True) -> "Labelled | None":
        """As :meth:`read`, with the labels of each image, which are None where it has one."""
        path = cls.path(shard)
        try:
            with bounded.opened(path, MOST_INDEX) as file:
                arrays = _arrays(file, (*cls._fields, "shard"), ARRAYS)
            size = int(arrays.pop("shard_bytes"))
            if arrays.pop("shard") == shard.name and (not there or size == shard.stat().st_size):
                own = {name: arrays.pop(name) for name in ("places", "targets", "keys")}
                index = cls(**own, shard_bytes=size)._checked(several=bool(arrays))
                return index, restored(arrays, len(index.keys)) if arrays else None
            reason = "is of another shard"
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            reason = f"can't be read ({shortened(str(error))})"
        logger.warning("%s %s: the shard is scanned in its place", path, reason)
        return None

    def _checked(self, *, several: bool) -> "ShardIndex":
        """Itself. Raises ValueError where it can't be the index of a shard of its size.

        ``several``: its targets are no labels, which are stored in another way.
        """
        places, targets, keys, size = self
        kinds = (places.dtype.kind, targets.dtype.kind, keys.dtype.kind)
        if kinds != ("i", "i", "S") or keys.dtype.itemsize > MOST_KEY:
            raise ValueError("its arrays have other types")
        if not (places.shape == (len(targets), 2) and targets.shape == keys.shape):
            raise ValueError("its arrays have other shapes")
        begins, sizes = places.T
        if len(targets) and not (
            (places >= 0).all()
            and (begins <= size - sizes).all()
            and ((targets == SEVERAL).all() if several else targets.min() >= 0)
        ):
            raise ValueError("it names places outside of the shard")
        if len(targets) and targets.max() >= MOST_CLASSES:
            raise ValueError(f"label {targets.max()}, {MOST_CLASSES - 1} at most")
        return self

    def write(self, shard: Path, labels: Sequence[Labels] | None = None) -> None:
        """Put the index beside ``shard``, which must be whole.

        ``labels`` are those of each image where it has any number of them; its target is
        ``SEVERAL`` then.
        """
        more = {} if labels is None else stored(labels)
        with written_whole(self.path(shard)) as path:
            np.savez(path, shard=shard.name, **self._asdict(), **more)

    @staticmethod
    def path(shard: Path) -> Path:
        """The file that holds the index of ``shard``."""
        return shard.with_suffix(".index.npz")


def several_labels(where: Path | str) -> OptionError:
    """What is said of shards that are to have one label of each image and have several."""
    return OptionError("task", f"{where}: images have any number of labels: add --task multilabel")


Labelled = tuple[ShardIndex, list[Labels] | None]
"""An index, and the labels of each image where it has any number of them."""


def _arrays(
    file: IO[bytes], names: Sequence[str], together: Sequence[str]
) -> dict[str, np.ndarray]:
    """The named arrays of a file of numpy.savez, of ``MOST_INDEX`` bytes at most when unpacked.

    Those ``together`` are all there, or none is. Raises ValueError, and what zipfile raises for
    damage.
    """
    file.seek(-_ZIP64_BYTES - _END.size, os.SEEK_END)
    before, end = file.read(_ZIP64_BYTES), _END.unpack(file.read())
    # zipfile makes an object of each entry of the directory.
    if before.startswith(b"PK\6\7") or end[0] != b"PK\5\6" or end[5] > MOST_DIRECTORY:
        raise ValueError("not what numpy.savez writes")
    with zipfile.ZipFile(file) as saved:
        unpacked = sum(info.file_size for info in saved.infolist())
        if unpacked > MOST_INDEX:
            most = bounded.size_text(MOST_INDEX)
            raise ValueError(f"{bounded.size_text(unpacked)} when unpacked, {most} at most")
        if f"{together[0]}.npy" in saved.namelist():
            names = (*names, *together)
        return {name: _array(saved, name) for name in names}


def _array(saved: zipfile.ZipFile, name: str) -> np.ndarray:
    info = saved.getinfo(f"{name}.npy")
    with saved.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of NumPy's format")
        shape, by_columns, dtype = _HEADERS[version](file)
        if dtype.hasobject or by_columns and len(shape) > 1:
            raise ValueError(f"{name} is of another kind")
        # The header may promise any number of elements, none of which is made for it.
        size = math.prod(shape) * dtype.itemsize
        content = file.read(info.file_size)
        if len(content) != size:
            raise ValueError(f"{len(content)} bytes of {name} instead of {size}")
    return np.frombuffer(content, dtype).reshape(shape)


class _Member(NamedTuple):
    offset_data: int
    size: int
    content: bytes  # of labels; images stay on disk


Sample = tuple[Path, str, dict[str, _Member]]
"""Shard, key, members by extension."""


def _samples(shard: Path) -> Iterator[Sample]:
    return ((shard, key, members) for key, members in shard_samples(shard))


def _place(shard: Path, key: str, members: dict[str, _Member], label: int) -> Place:
    """A row of an index. Raises DataError for a sample without an image."""
    image = next((m for e, m in members.items() if f".{e}" in EXTENSIONS), None)
    if image is None:
        raise DataError(f"{shard}: sample {key} has no image")
    return image.offset_data, image.size, label, key


class _Headers:
    """A shard for tarfile, which would read headers of any length into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek
        self.most = MOST_HEADER

    def read(self, size: int) -> bytes:
        if size > self.most:
            raise tarfile.ReadError(f"a header of {size:,} bytes, {self.most:,} at most")
        content = self._file.read(size)
        # tarfile's search takes time with the square of such a number (CVE-2024-6232).
        if self.most == MOST_HEADER and size > tarfile.BLOCKSIZE and _LONG_NUMBER.search(content):
            raise tarfile.ReadError("a header with an endless number")
        return content

    def content(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
        """Of a label. Raises ReadError for one that is too long."""
        if info.size > MOST_LABEL:
            raise tarfile.ReadError(f"{info.name} of {info.size:,} bytes, {MOST_LABEL:,} at most")
        self.most = MOST_LABEL
        try:
            return tar.extractfile(info).read()
        finally:
            self.most = MOST_HEADER


def shard_samples(shard: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, member by extension) of each sample, in the order of the shard."""
    current, members = None, {}
    try:
        for info, content in _members(shard):
            folder, name = os.path.split(info.name)
            stem, dot, extension = name.partition(".")
            if not info.isfile() or not stem or not dot:
                continue
            if info.issparse():
                raise tarfile.ReadError(f"{info.name} is stored with holes")
            key = os.path.join(folder, stem)
            if key != current and members:
                yield current, members
                members = {}
            current = key
            extension = extension.lower()
            label = content() if extension in ("cls", "json") else b""
            members[extension] = _Member(info.offset_data, info.size, label)
    except _DAMAGE as error:
        raise DataError(
            f"{shard} is not a plain tar file that can be read: {shortened(str(error))}"
        ) from None
    if members:
        yield current, members


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """The members of a tar file and what gets the content of each, which may be a label only."""
    before = -1
    with bounded.opened(shard, sys.maxsize) as file:
        headers = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            for info in tar:
                # A size below zero leads back, again and again (CVE-2025-8194).
                if info.size < 0 or info.offset <= before:
                    raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
                before = info.offset
                yield info, partial(headers.content, tar, info)
                tar.members = []  # or tarfile keeps them all


def _shard_label(shard: Path, key: str, members: dict[str, _Member]) -> int:
    try:
        if "cls" in members:
            label = members["cls"].content.decode("ascii").strip()
        else:
            label = bounded.parse_json(members["json"].content)["label"]
        if isinstance(label, str) and _WHOLE.fullmatch(label):
            label = int(label)
        if type(label) is not int:
            raise TypeError
    except (KeyError, IndexError, TypeError, ValueError):
        raise DataError(
            f"{shard}: sample {shortened(key)} needs its label as .cls, or as 'label' of .json"
        ) from None
    if not 0 <= label < MOST_CLASSES:
        raise DataError(
            f"{shard}: sample {shortened(key)} has label {shown(label)}: from 0 to "
            f"{MOST_CLASSES - 1} at most"
        )
    return label
