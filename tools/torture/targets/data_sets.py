"""Data sets: tables, IDX files, shards and their index, lists of shards, folders."""

import contextlib
import gzip
import io
import json
import random
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from config import DataOptions
from pipeline.sources.base import Source
from pipeline.sources.registry import open_source
from pipeline.sources.shard_index import ShardIndex
from pipeline.sources.shards import ShardSource
from tools.torture.targets import Target
from tools.torture.targets.mutation import (
    changed,
    mutated,
    mutated_file,
    mutated_text,
    odd_number,
    odd_text,
    odd_value,
)

_IMAGES = ("a.png", "b.jpg", "sub/c.png", "sub/d.jpeg", "e f.png", "sub/a.png")


def _look_at(source: Source) -> None:
    """What training asks of each image."""
    assert len(source) == len(source.targets)
    assert source.targets.min() >= 0 and source.targets.max() < len(source.classes)
    for index in range(min(len(source), 20)):
        assert isinstance(source.sample_id(index), str) and source.identity(index)
        with contextlib.closing(source.open(index)) as image:
            assert image.read() is not None


def _emptied(folder: Path) -> Path:
    """A folder for one input."""
    shutil.rmtree(folder / "set", ignore_errors=True)
    (folder / "set").mkdir()
    return folder / "set"


# --- tables ---------------------------------------------------------------------------------------

_TABLES = [
    "path,label\na.png,cat\nb.jpg,dog\nsub/c.png,cat\nsub/d.jpeg,dog\n",
    "a.png,0\nb.jpg,1\nsub/c.png,10\n",
    "image;class;split\na;x;train\nb;y;val\nsub/c;x;test\nsub/d;y;train\n",
    'id\tfilename\ttarget\tis_train\n1\t"e f.png"\t"a ""quoted"" name"\t1\n2\ta.png\tb\t0\n',
    "image_id|labels|fold\r\na|1|0\r\nb|2|1\r\nsub\\c|3|2\r\n",
    "\ufefffname,species,kfold\na.png,é,1\nb.jpg,日本,2\n",
]
_TABLE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "val_fraction": (None, 0.1),
    "image_column": ("path", "label"),
    "label_column": ("class", "none"),
    "split_column": ("none", "split"),
    "on_bad_image": ("error",),
    "image_root": (".", "sub", "nowhere"),
}


def _table(rng: random.Random) -> tuple[bytes, dict[str, Any]]:
    content = mutated_file(rng, _TABLES, 0.2)
    odd = rng.sample(list(_TABLE_OPTIONS), rng.choice((0, 0, 1, 2)))
    options = {name: rng.choice(_TABLE_OPTIONS[name]) for name in odd}
    divided = b"split" in content or b"is_train" in content
    fraction = {} if divided else {"val_fraction": 0.5}
    return content, {"on_bad_image": "skip", **fraction, **options}


def _read_table(given: tuple[bytes, dict[str, Any]], folder: Path) -> None:
    content, options = given
    if not (folder / "sub").exists():
        (folder / "sub").mkdir()
        for name in _IMAGES:
            (folder / name).touch()
    path = folder / "list.csv"
    path.write_bytes(content)
    if options.get("image_root"):
        options = {**options, "image_root": str(folder / options["image_root"])}
    data = DataOptions(data_set="CSV", data_path=str(path), **options)
    for is_train in (True, False):
        source = open_source(is_train, data, seed=0)
        if len(source):
            assert source.targets.max() < len(source.classes)
            assert source.sample_id(len(source) - 1)


# --- IDX ------------------------------------------------------------------------------------------


def _idx_file(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


_IDX_IMAGES = _idx_file(np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5))
_IDX_LABELS = _idx_file(np.arange(4, dtype=np.uint8))


def _idx(rng: random.Random) -> tuple[bytes, bytes, str]:
    """Images, labels and the ending of both."""
    images, labels = _IDX_IMAGES, _IDX_LABELS
    if rng.random() < 0.5:
        images, labels = mutated(rng, [images]), mutated(rng, [labels])
    if rng.random() < 0.5:
        return images, labels, ""
    images, labels = (gzip.compress(content, 1, mtime=0) for content in (images, labels))
    if rng.random() < 0.5:
        images, labels = mutated(rng, [images]), mutated(rng, [labels])
    return images, labels, ".gz"


def _read_idx(given: tuple[bytes, bytes, str], folder: Path) -> None:
    images, labels, ending = given
    for old in folder.glob("t10k*"):
        old.unlink()
    (folder / f"t10k-images-idx3-ubyte{ending}").write_bytes(images)
    (folder / f"t10k-labels-idx1-ubyte{ending}").write_bytes(labels)
    source = open_source(False, DataOptions(data_set="MNIST", data_path=str(folder)), seed=0)
    assert len(source) == len(source.targets) and source.targets.max() < 10
    assert source.open(len(source) - 1).size


# --- shards ---------------------------------------------------------------------------------------


def _tar(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _member(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


_SAMPLES = [
    *(_member("s0.png", b"png 0"), _member("s0.cls", b"0"), _member("d/s1.jpg", b"jpeg 1")),
    *(
        _member("d/s1.json", b'{"label": 1}'),
        _member("s2.png", b"x" * 700),
        _member("s2.cls", b"2"),
    ),
]
_TARS = [_tar(_SAMPLES), _tar(_SAMPLES, tarfile.GNU_FORMAT), _tar(_SAMPLES, tarfile.USTAR_FORMAT)]
_TARS += [_tar([_member("n" * 200 + ".png", b"long"), _member("n" * 200 + ".cls", b"3")])]
_KINDS = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
_KINDS += [tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE]


def _shard(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutated(rng, _TARS)
    members = []
    for name in ("s0", rng.choice(("s1", odd_text(rng).replace("\0", "") or "x"))):
        label = rng.choice((odd_text(rng), str(odd_number(rng)), json.dumps(odd_value(rng, 1))))
        if rng.random() < 0.5:
            label = json.dumps({"label": odd_value(rng, 1)}) if rng.random() < 0.9 else "[" * 3000
            members.append(_member(f"{name}.json", label.encode("utf-8", "replace")))
        else:
            members.append(_member(f"{name}.cls", label.encode("utf-8", "replace")))
        members.append(_member(f"{name}.png", b"image"))
    changed_one, _ = rng.choice(members)
    if rng.random() < 0.4:
        changed_one.type = rng.choice(_KINDS)
    if rng.random() < 0.3:
        key = rng.choice(("path", "size", "hdrcharset", "GNU.sparse.major", "GNU.sparse.size", "x"))
        value = str(rng.choice((odd_number(rng), "1", "-512", "BINARY", "9" * 300)))
        changed_one.pax_headers = {key: value}
    with contextlib.suppress(UnicodeError):
        return _tar(members)
    return rng.choice(_TARS)


def _read_shard(content: bytes, folder: Path) -> None:
    path = folder / "train.tar"
    path.write_bytes(content)
    _look_at(ShardSource([path]))


def _index_arrays(shard: bytes) -> dict[str, Any]:
    rows = [(512, 5, 0, "s0"), (2048, 6, 1, "d/s1"), (4096, 700, 2, "s2")]
    return {**ShardIndex.of(rows, len(shard))._asdict(), "shard": "train.tar"}


_INDEX = _index_arrays(_TARS[0])


def _npz(arrays: dict[str, Any], *, deflated: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if deflated else np.savez)(buffer, **arrays)
    return buffer.getvalue()


_INDICES = [_npz(_INDEX), _npz(_INDEX, deflated=True)]


def _odd_array(rng: random.Random, name: str) -> np.ndarray:
    """Another array than the index has under that name."""
    array = np.asarray(_INDEX[name])
    chance = rng.random()
    if chance < 0.3 and array.dtype.kind == "i":
        array = array.copy()
        array.flat[rng.randrange(array.size)] = rng.choice((-1, 10**12, -(2**63), 2**63 - 1, 5))
        return array
    if chance < 0.5:
        return array.astype(rng.choice(("f8", "i1", "u8", "S3", "U9", "bool", "c16")))
    if chance < 0.7:
        return np.resize(array, rng.choice(((0,), (1,), (), (2, 2), (3, 3), (0, 2), (5, 1, 1))))
    return np.asarray([odd_number(rng) for _ in range(3)], dtype=rng.choice(("f8", "U400")))


def _index(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutated(rng, _INDICES)
    name = rng.choice(list(_INDEX))
    arrays = {**_INDEX, name: np.array(0)}
    with contextlib.suppress(OverflowError, ValueError):
        arrays[name] = _odd_array(rng, name)
    content = _npz(arrays, deflated=rng.random() < 0.5)
    if rng.random() < 0.7:
        return content
    # What the header of an array says, with sums and sizes that fit.
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, mutated(rng, [old.read(info)], 1))
    return buffer.getvalue()


def _read_index(content: bytes, folder: Path) -> None:
    path = folder / "train.tar"
    path.write_bytes(_TARS[0])
    ShardIndex.path(path).write_bytes(content)
    _look_at(ShardSource([path]))


_INFO = {
    "splits": {
        "train": {"filenames": ["train.tar"], "num_samples": 3},
        "validation": {"filenames": ["val.tar"]},
    },
    "classes": ["cat", "dog", "ant", "bee"],
}


def _info(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated_text(rng, [json.dumps(_INFO)]).encode("utf-8", "replace")
    return json.dumps(changed(rng, _INFO)).encode()


def _read_info(content: bytes, folder: Path) -> None:
    for name in ("train.tar", "val.tar"):
        if not (folder / name).exists():
            (folder / name).write_bytes(_TARS[0])
    (folder / "_info.json").write_bytes(content)
    data = DataOptions(data_set="wds/x", data_path=str(folder))
    for is_train in (True, False):
        _look_at(open_source(is_train, data, seed=0))


# --- folders --------------------------------------------------------------------------------------

_NAMES = ("train", "val", "test", "cat", "dog", "Training", "set_test", "1", "01", "train_cat")


def _names(rng: random.Random) -> list[bytes]:
    """Paths of files, whose folders are made."""
    paths = []
    for _ in range(rng.randrange(1, 6)):
        parts = []
        for _ in range(rng.choice((1, 2, 3, 3, 3, 4))):
            part = rng.choice((rng.choice(_NAMES), rng.choice(_NAMES), odd_text(rng)))
            name = part.encode("utf-8", "surrogatepass")
            name = mutated(rng, [name], 1) if rng.random() < 0.2 else name
            parts.append(name.replace(b"\0", b"").replace(b"/", b"")[:200] or b"x")
        parts[-1] += rng.choice((b".png", b".jpg", b".JPG", b".txt", b".csv", b""))
        paths.append(b"/".join(part if part.strip(b".") else b"x" for part in parts))
    return paths


def _read_folder(paths: list[bytes], folder: Path) -> None:
    root = bytes(_emptied(folder))
    for path in paths:
        whole = Path(root.decode(), path.decode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError):  # a folder that another path has as a file
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.touch()
    for fraction in (None, 0.5):
        data = DataOptions(data_set="IMNET", data_path=root.decode(), val_fraction=fraction)
        with contextlib.suppress(TARGETS[-1].ours):
            source = open_source(True, data, seed=0)
            assert len(source.classes) == len(set(source.classes))
            assert all(Path(source.sample_id(index)).exists() for index in range(len(source)))
    open_source(False, data, seed=0)


TARGETS = (
    Target("CSV tables", _table, _read_table),
    Target("IDX files", _idx, _read_idx),
    Target("tar shards", _shard, _read_shard),
    Target("index of shards", _index, _read_index, share=0.5),
    Target("list of shards", _info, _read_info, share=0.5),
    Target("class folders", _names, _read_folder, share=0.5),
)
