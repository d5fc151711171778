"""wds/NAME: tar shards in WebDataset's form, local or remote."""

import functools
import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from bounded import size_text
from errors import DataError, OptionError, first_names, printable
from pipeline.limits import MOST_FILE_BYTES, BadImageError
from pipeline.remote import INDEX_BYTES, LISTING_BYTES, RemoteFolder, is_remote
from pipeline.sources.base import (
    VAL_NAMES,
    Factory,
    PartOf,
    ReadOnce,
    Source,
    data_root,
    first_existing,
    read_json,
    refuse_val_fraction,
)
from pipeline.sources.labels import Labels, class_names, multi_hot
from pipeline.sources.names import Names
from pipeline.sources.shard_index import (
    MOST_CLASSES,
    MOST_KEY,
    Labelled,
    ShardIndex,
    several_labels,
)

if TYPE_CHECKING:
    from config import DataOptions

MOST_SHARDS = 100_000  # of a split
TRAIN_NAMES = ("train", "training")  # of the training part


class ShardSource(Source):
    """Tar shards in webdataset's form, with random access by an index of each.

    Remote ones are fetched whole when one of their images is first needed.

    The index is read where ``tools.data pack`` left one, else made from the tar's headers.

    A sample is the run of members with the same name up to the first dot: an image and ``.cls``
    (its label as a number) or ``.json`` with ``label``. Classes have numbers for names, unless
    ``_info.json`` lists them as ``classes``.

    With ``multilabel`` a sample has any number of labels
    (``pipeline.sources.shard_labels.labels_of_sample``), by name or by number.
    """

    MOST_OPEN = 64  # files per process
    shareable = True

    def __init__(
        self,
        shards: Sequence[Path],
        classes: list[str] | None = None,
        remote: RemoteFolder | None = None,
        *,
        multilabel: bool = False,
    ) -> None:
        self.shards = list(shards)
        self.remote = remote
        self._files: dict[int, IO[bytes]] = {}  # the one used last comes last
        if remote is None:
            found = [_index_of(shard, multilabel) for shard in self.shards]
        else:
            found = _fetch_indices(remote, self.shards, multilabel)
        tables = [table for table, _ in found]
        self.sizes = [table.shard_bytes for table in tables]
        if not any(len(table.targets) for table in tables):
            raise DataError(f"no samples in {first_names([str(s) for s in self.shards])}")
        numbers = np.repeat(np.arange(len(tables)), [len(table.targets) for table in tables])
        places = np.concatenate([table.places for table in tables])
        self.entries = np.column_stack([numbers, places])  # (N, 3): shard, offset, size
        self.groups = numbers
        self.targets = np.concatenate([table.targets for table in tables])
        self.keys = Names([key for table in tables for key in table.keys.tolist()])
        if multilabel:
            self._label([label for _, labels in found for label in labels], classes)
            return
        self.classes = classes or [str(label) for label in range(self.targets.max() + 1)]
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.sample_id(wrong[0])}: label {self.targets[wrong[0]]} is none of the "
                f"{len(self.classes)} classes of the training part"
            )

    def _label(self, labels: list[Labels], classes: list[str] | None) -> None:
        """Set classes and targets to those of ``labels``, which are names or numbers of classes."""
        names = {name for each in labels for name in each}
        if not names and classes is None:
            raise DataError(f"no sample in {self.shards[0]} has a label")
        self.classes = classes or class_names(sorted(names))
        if not names <= set(self.classes) and all(name.isdecimal() for name in names):
            numbers = {str(i): name for i, name in enumerate(self.classes)}
            labels = [tuple(numbers.get(name, name) for name in each) for each in labels]
        self.targets = multi_hot(labels, self.classes, self.sample_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def open(self, index: int) -> io.BytesIO:
        shard, offset, size = self.entries[index].tolist()
        if size > MOST_FILE_BYTES:
            raise BadImageError(
                f"{size_text(size)}, and no more than {size_text(MOST_FILE_BYTES)} is read of an "
                "image"
            )
        # Workers that were forked share a file's place, so none may rely on it.
        return io.BytesIO(os.pread(self._file(shard).fileno(), size, offset))

    def _file(self, shard: int) -> IO[bytes]:
        file = self._files.pop(shard, None)
        if file is None:
            path = self.shards[shard]
            if self.remote is not None:
                name = path.relative_to(self.remote.folder).as_posix()
                path = self.remote.fetch(name, self.sizes[shard])
            file = open(path, "rb")  # noqa: SIM115 (it stays open)
            if hasattr(os, "posix_fadvise"):
                # Others of this file come soon: let the system read it from front to back.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._files[shard] = file
        if len(self._files) > self.MOST_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return file

    def sample_id(self, index: int) -> str:
        return f"{self.shards[self.entries[index, 0]]}:{os.fsdecode(self.keys[index])}"

    def version(self) -> str:
        found = hashlib.blake2b(np.ascontiguousarray(self.entries).tobytes())
        for shard, size in zip(self.shards, self.sizes, strict=True):
            # Of a remote one the copy is as old as it happens to be.
            written = 0 if self.remote is not None else os.stat(shard).st_mtime_ns
            found.update(f"{shard.name} {size} {written}\n".encode("utf-8", "surrogateescape"))
        return found.hexdigest()

    def identity(self, index: int) -> str:
        # The folder of the copies may be another one on each machine.
        folder = "" if self.remote is None else f"{self.remote.folder}{os.sep}"
        return self.sample_id(index).removeprefix(folder)


def _index_of(shard: Path, multilabel: bool) -> Labelled:
    """The index of a local shard, made where there is none."""
    if not multilabel:
        return ShardIndex.read(shard) or ShardIndex.scan(shard), None
    found = ShardIndex.read_labelled(shard)
    return found if found and found[1] is not None else ShardIndex.scan_labelled(shard)


def _fetch_indices(
    remote: RemoteFolder, shards: Sequence[Path], multilabel: bool
) -> list[Labelled]:
    """The indices of remote shards, which can't be scanned without fetching them all."""

    def fetch(shard: Path) -> Labelled:
        name = ShardIndex.path(shard).relative_to(remote.folder).as_posix()
        try:
            remote.fetch(name, most=INDEX_BYTES)
        except OSError as error:
            raise DataError(f"{error}; python -m tools.data pack writes the index") from None
        found = ShardIndex.read_labelled(shard, there=False)
        if found is None:
            ShardIndex.path(shard).unlink(missing_ok=True)
            raise DataError(f"{remote.address}/{name} is not the index of its shard")
        if multilabel and found[1] is None:
            raise DataError(
                f"{remote.address}/{name} has one label of each image: pack the set again, with "
                "--task multilabel"
            )
        if not multilabel and found[1] is not None:
            raise several_labels(f"{remote.address}/{name}")
        return found

    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(fetch, shards))


def _remote_set(data: "DataOptions") -> PartOf:
    """The shards of ``_info.json`` at an address."""
    remote = RemoteFolder(data.data_path, data.shard_cache, int(data.shard_cache_gb * 1e9))
    try:
        # It may have changed since: small enough to be fetched each time.
        info = read_json(remote.fetch("_info.json", most=LISTING_BYTES, fresh=True))
    except OSError as error:
        raise OptionError("data_path", f"{error}; python -m tools.data pack writes it") from None
    where = f"{remote.address}/_info.json"

    @functools.cache
    def part(is_train: bool) -> Source:
        names = TRAIN_NAMES if is_train else VAL_NAMES
        files = _listed(info, names, where)
        if not files:
            raise OptionError("data_path", f"{where} has no split {names[0]}")
        classes = _listed_classes(info, where)
        if classes is None and not is_train:
            classes = part(True).classes
        shards = [remote.path(file) for file in files]
        return ShardSource(shards, classes, remote, multilabel=data.task == "multilabel")

    return part


def _listed(info: Any, splits: Sequence[str], where: Path | str) -> list[str]:
    """The files of the first of the ``splits`` that an ``_info.json`` has; DataError if it can't
    be a list of shards."""
    known = info.get("splits", {}) if isinstance(info, dict) else None
    if not isinstance(known, dict):
        raise DataError(f"{where} is no list of shards: python -m tools.data pack writes one")
    split = next((s for s in splits if s in known), None)
    if split is None:
        return []
    files = known[split].get("filenames") if isinstance(known[split], dict) else None
    if not isinstance(files, list) or len(files) > MOST_SHARDS:
        raise DataError(
            f"{where}: 'filenames' of {split} is no list of names, {MOST_SHARDS:,} at most"
        )
    wrong = [f for f in files if not isinstance(f, str) or not f.endswith(".tar") or "\0" in f]
    if wrong:
        raise DataError(f"{where}: {_shown(wrong[0])} is not the name of a file .tar")
    if len(set(files)) < len(files):
        twice = next(f for f, n in Counter(files).items() if n > 1)
        raise DataError(f"{where} names {_shown(twice)} more than once")
    return files


def _listed_classes(info: dict[str, Any], where: Path | str) -> list[str] | None:
    classes = info.get("classes")
    if classes is None:
        return None
    named = isinstance(classes, list) and len(classes) <= MOST_CLASSES
    if named and all(isinstance(c, str) and len(c) <= MOST_KEY for c in classes):
        return classes
    raise DataError(
        f"{where}: 'classes' is no list of names, {MOST_CLASSES:,} at most, of up to {MOST_KEY:,} "
        "characters"
    )


def _shown(name: Any) -> str:
    return printable(repr(name)[:100])


def webdataset(name: str) -> Factory:
    """The factory of shards: those of ``_info.json``, or ``*train*.tar`` and ``*val*.tar``."""
    return ReadOnce(_shard_set)


def _shard_set(data: "DataOptions", seed: int) -> PartOf:
    refuse_val_fraction(data, "a sharded set")
    if is_remote(data.data_path):
        return _remote_set(data)
    multilabel, root = data.task == "multilabel", data_root(data)
    shards = _shards(root, TRAIN_NAMES)
    if not shards:
        raise OptionError("data_path", f"{root} has no shards *train*.tar and no _info.json")
    classes = _listed_classes(_shard_info(root), root / "_info.json")
    train = ShardSource(shards, classes, multilabel=multilabel)

    def part(is_train: bool) -> Source:
        if is_train:
            return train
        val = _shards(root, VAL_NAMES)
        if not val:
            raise OptionError("data_path", f"{root} has no shards *val*.tar (nor *test*.tar)")
        return ShardSource(val, train.classes, multilabel=multilabel)

    return part


def _shards(root: Path, splits: Sequence[str]) -> list[Path]:
    info = _shard_info(root)
    if "splits" in info:
        return [root / file for file in _listed(info, splits, root / "_info.json")]
    for split in splits:
        found = sorted({*root.glob(f"*{split}*.tar"), *root.glob(f"{split}/**/*.tar")})
        if found:
            return found
    return []


def _shard_info(root: Path) -> dict[str, Any]:
    info = first_existing((root / "_info.json", root / "info.json"))
    if info is None:
        return {}
    found = read_json(info)
    return {"splits": {}, **found} if isinstance(found, dict) else {"splits": None}
