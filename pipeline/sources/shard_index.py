"""Where the images of a tar shard are."""

import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import DataError
from pipeline.formats import EXTENSIONS
from utils import written_whole

logger = logging.getLogger(__name__)


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
    def of(cls, rows: Sequence[tuple[int, int, int, str]], shard_bytes: int) -> "ShardIndex":
        """The index of rows of offset, size, label and key."""
        places = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        targets = np.array([row[2] for row in rows], dtype=np.int64)
        keys = np.array([os.fsencode(row[3]) for row in rows], np.bytes_)
        return cls(places, targets, keys, shard_bytes)

    @classmethod
    def scan(cls, shard: Path) -> "ShardIndex":
        """The index made from the headers of the tar file, all of which are read.

        Raises DataError for a file that isn't a plain tar file, or lacks an image or label.
        """
        rows = []
        for key, members in shard_samples(shard):
            image = next((m for e, m in members.items() if f".{e}" in EXTENSIONS), None)
            if image is None:
                raise DataError(f"{shard}: sample {key} has no image")
            label = _shard_label(shard, key, members)
            rows.append((image.offset_data, image.size, label, key))
        return cls.of(rows, shard.stat().st_size)

    @classmethod
    def read(cls, shard: Path, *, there: bool = True) -> "ShardIndex | None":
        """The index beside ``shard``; None if there is none for a shard of its name and size.

        ``there``: the shard is a file already, whose size can be compared.
        """
        path = cls.path(shard)
        try:
            with np.load(path, allow_pickle=False) as saved:
                size = int(saved["shard_bytes"])
                if saved["shard"] == shard.name and (not there or size == shard.stat().st_size):
                    return cls(*(saved[name] for name in cls._fields[:3]), size)
            reason = "is of another shard"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = f"can't be read ({error})"
        logger.warning("%s %s: the shard is scanned in its place", path, reason)
        return None

    def write(self, shard: Path) -> None:
        """Put the index beside ``shard``, which must be whole."""
        with written_whole(self.path(shard)) as path:
            np.savez(path, shard=shard.name, **self._asdict())

    @staticmethod
    def path(shard: Path) -> Path:
        """The file that holds the index of ``shard``."""
        return shard.with_suffix(".index.npz")


class _Member(NamedTuple):
    offset_data: int
    size: int
    content: bytes  # of labels; images stay on disk


def shard_samples(shard: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, member by extension) of each sample, in the order of the shard."""
    current, members = None, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                folder, name = os.path.split(info.name)
                stem, dot, extension = name.partition(".")
                if not info.isfile() or not stem or not dot:
                    continue
                key = os.path.join(folder, stem)
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                extension = extension.lower()
                is_label = extension in ("cls", "json")
                content = tar.extractfile(info).read() if is_label else b""
                members[extension] = _Member(info.offset_data, info.size, content)
                tar.members = []  # or tarfile keeps them all
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard} is not a plain tar file that can be read: {error}") from None
    if members:
        yield current, members


def _shard_label(shard: Path, key: str, members: dict[str, _Member]) -> int:
    try:
        if "cls" in members:
            return int(members["cls"].content)
        return int(json.loads(members["json"].content)["label"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{shard}: sample {key} needs its label as .cls, or as 'label' of .json"
        ) from None
