"""Small files that ask for much: configurations, tables, shards, lists. Seconds and memory of each.

    python -m tools.torture texts

Each is read by a process of its own. It must be refused with an error that names the bound, or be
read, within the seconds and the memory that are stated here.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import multiprocessing
import os
import resource
import socket
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bounded
import config
from errors import UserError, did_you_mean, shortened
from pipeline.sources.registry import open_source
from pipeline.sources.shard_index import ShardIndex
from tools.common import command
from tools.common.trained import find_images
from tools.serve.drift import Reference
from training.label_files import read_class_map, read_real_labels

SECONDS = 10.0  # that one may take
MEMORY = 256 << 20  # bytes that its process may grow by
_GIB = 1 << 30


class Case(NamedTuple):
    """A hostile file, and who reads it."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]


class Outcome(NamedTuple):
    """What came of a case."""

    answer: str
    ours: bool
    """Whether it was read, or refused with an error of the user."""
    seconds: float
    growth: int
    """Bytes, at the peak."""


# --- who reads ------------------------------------------------------------------------------------


def _configuration(folder: Path) -> object:
    return config.resolve({"config": str(folder / "file")})


def _data_set(name: str, file: str = "", **options: object) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        data = config.DataOptions(data_set=name, data_path=str(folder / file), **options)
        return open_source(True, data, seed=0)

    return read


_table = _data_set("CSV", "file", val_fraction=0.5, on_bad_image="skip")
_shards, _mnist = _data_set("wds/x"), _data_set("MNIST")


# --- what is made ---------------------------------------------------------------------------------


def _text(*parts: str, name: str = "file") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with open(folder / name, "w", encoding="utf-8") as file:
            file.writelines(parts)

    return make


def _sparse(size: int, name: str = "file", begin: bytes = b"") -> Callable[[Path], None]:
    """A file of ``size`` bytes that takes none on the disk."""

    def make(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.write(begin)
            file.truncate(size)

    return make


def _link(target: str, name: str = "file") -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def _pipe(name: str = "file") -> Callable[[Path], None]:
    return lambda folder: os.mkfifo(folder / name)


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(folder):
        listening.bind("file")


def _repeated(line: str) -> Callable[[Path], None]:
    """YAML in which each of nine lines repeats the one before ten times."""
    names = "abcdefghij"
    pairs = itertools.pairwise(names)
    lines = [line.format(name, ", ".join([f"*{before}"] * 10)) for before, name in pairs]
    return _text("\n".join(["a: &a {k: 1}", *lines]))


def _bases(folder: Path) -> None:
    for number in range(1000):
        (folder / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n", encoding="utf-8")
    (folder / "file").write_text("base: 0.yaml\n", encoding="utf-8")


def _member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def _tar(*samples: tuple[str, bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with tarfile.open(folder / "train.tar", "w") as tar:
            for name, content in samples:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return make


def _huge_member(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], None]:
    begin = _member("a.png", 0) + _member(name, 20 * _GIB, kind)
    return _sparse(21 * _GIB, "train.tar", begin)


def _index(**arrays: np.ndarray) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _tar(("a.png", b"x"), ("a.cls", b"0"))(folder)
        shard = folder / "train.tar"
        content = {**ShardIndex.scan(shard)._asdict(), "shard": shard.name, **arrays}
        np.savez_compressed(ShardIndex.path(shard), **content)

    return make


def _promising_index(folder: Path) -> None:
    _index()(folder)
    path = ShardIndex.path(folder / "train.tar")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["targets.npy"] = entries["targets.npy"].replace(
        b"(1,), }" + b" " * 12, b"(100000000000,), }".ljust(19)
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _index_of_entries(folder: Path) -> None:
    _index()(folder)
    with zipfile.ZipFile(ShardIndex.path(folder / "train.tar"), "a") as archive:
        for number in range(100_000):
            archive.writestr(f"{number}", b"")


def _idx_gz(shape: tuple[int, ...], size: int) -> Callable[[Path], None]:
    """Gzipped images of that header, with ``size`` bytes of zeros behind it."""

    def make(folder: Path) -> None:
        with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb", 1) as file:
            file.write(bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes())
            for _ in range(0, size, 1 << 24):
                file.write(bytes(1 << 24))
        (folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 0]))

    return make


def _deep(name: str) -> Callable[[Path], None]:
    return _text("[" * 10_000_000, name=name)


def _one_path(folder: Path) -> None:
    rows = "".join(f"{number}.png,a\n" for number in range(100_000))
    _text("path,label\n", rows, f"{'x' * 100_000},a\n")(folder)


_ALIASES = "{0}: &{0} [{1}]"
CASES: dict[str, Case] = {
    "YAML: lists of aliases, 10⁹ values": Case(_repeated(_ALIASES), _configuration),
    "YAML: merges of aliases, 10⁹ keys": Case(
        _repeated("{0}: &{0} {{{{<<: [{1}]}}}}"), _configuration
    ),
    "YAML: an alias of itself": Case(_text("scale: &a [1, *a]"), _configuration),
    "YAML: 20,000 keys": Case(_text(*(f"k{i}: 1\n" for i in range(20_000))), _configuration),
    "YAML: 250,000 opening brackets": Case(_text("lr: ", "[" * 250_000), _configuration),
    "YAML: a number of 250,000 digits": Case(_text("lr: ", "9" * 250_000), _configuration),
    "YAML: a sparse file of 10 GiB": Case(_sparse(10 * _GIB), _configuration),
    "YAML: /dev/zero": Case(_link("/dev/zero"), _configuration),
    "YAML: a named pipe": Case(_pipe(), _configuration),
    "YAML: a socket": Case(_socket, _configuration),
    "YAML: base: /dev/zero": Case(_text("base: /dev/zero"), _configuration),
    "YAML: a chain of 1,000 base files": Case(_bases, _configuration),
    "table: one path of 100,000 characters": Case(_one_path, _table),
    "table: one line of 900 MB": Case(_sparse(900_000_000, begin=b"path,label\n"), _table),
    "table: 1,000,000 columns": Case(_text("path,label\n", "x," * 1_000_000), _table),
    "table: an open quote before 100 MB": Case(
        _text('path,label\n"', "a.png,b\n" * 12_500_000), _table
    ),
    "table: a sparse file of 60 GiB": Case(_sparse(60 * _GIB), _table),
    "table: a named pipe": Case(_pipe("train.csv"), _data_set("CSV")),
    "shard: label 10¹²": Case(_tar(("a.png", b"x"), ("a.cls", b"1" + b"0" * 12)), _shards),
    "shard: label -1": Case(_tar(("a.png", b"x"), ("a.cls", b"-1")), _shards),
    "shard: a .cls of 20 GiB": Case(_huge_member("a.cls"), _shards),
    "shard: a .json of 20 GiB": Case(_huge_member("a.json"), _shards),
    "shard: pax headers of 20 GiB": Case(_huge_member("a", tarfile.XHDTYPE), _shards),
    "shard: a name of 20 GiB": Case(_huge_member("a", tarfile.GNUTYPE_LONGNAME), _shards),
    "shard: deep JSON": Case(_tar(("a.png", b"x"), ("a.json", b"[" * 1_000_000)), _shards),
    "shard: a named pipe": Case(_pipe("train.tar"), _shards),
    "index: 1 GiB of labels, deflated": Case(_index(targets=np.zeros(_GIB // 8, int)), _shards),
    "index: 10¹¹ labels in the header": Case(_promising_index, _shards),
    "index: an image of 10¹⁵ bytes": Case(_index(places=np.array([[0, 10**15]])), _shards),
    "index: 100,000 entries": Case(_index_of_entries, _shards),
    "_info.json: deep": Case(_deep("_info.json"), _shards),
    "_info.json: a sparse file of 10 GiB": Case(_sparse(10 * _GIB, "_info.json"), _shards),
    "IDX.gz: 1 GiB behind one image": Case(_idx_gz((1, 2, 2), _GIB), _mnist),
    "IDX.gz: 1 GiB announced, none there": Case(_idx_gz((_GIB // 784, 28, 28), 0), _mnist),
    "IDX.gz: 2⁹⁶ bytes announced": Case(_idx_gz((2**32 - 1,) * 3, 0), _mnist),
    "--class-map: a line of 60 MB of spaces": Case(
        _text("a", " " * 60_000_000, "b"), lambda folder: read_class_map(f"{folder}/file", int)
    ),
    "--real-labels: deep": Case(
        _deep("real.json"), lambda folder: read_real_labels(f"{folder}/real.json", 1000)
    ),
    "report.json: deep": Case(
        _deep("report.json"), lambda folder: Reference.read(folder / "report.json", ["a"])
    ),
    "list of images: a field of 100 MB": Case(
        _text("x" * 100_000_000, name="list.csv"),
        lambda folder: find_images([f"{folder}/list.csv"]),
    ),
}


# --- measuring ------------------------------------------------------------------------------------


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _answer(case: Case, folder: Path, to: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 2)
    before, began = _peak(), time.monotonic()
    try:
        case.read(folder)
        answer, ours = "read", True
    except UserError as error:
        answer, ours = str(error), True
    except BaseException as error:
        answer, ours = f"{type(error).__name__}: {error}", False
    to.send(Outcome(answer, ours, time.monotonic() - began, _peak() - before))


def measure(case: Case, folder: Path) -> Outcome:
    """Make the file of a case in ``folder`` and let a process read it."""
    case.make(folder)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(case, folder, there))
    process.start()
    there.close()
    try:
        if here.poll(3 * SECONDS):
            return here.recv()
        return Outcome("no end", False, 3 * SECONDS, 0)
    except EOFError:
        process.join()
        return Outcome(f"its process ended with {process.exitcode}", False, 0, 0)
    finally:
        process.kill()
        process.join()


def kept(outcome: Outcome) -> bool:
    """Whether an outcome is as promised."""
    return outcome.ours and outcome.seconds <= SECONDS and outcome.growth <= MEMORY


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser("torture texts", __doc__)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name begins so")
    parser.add_argument("--folder", help="where the files are made (default: the system's)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    begins = tuple(arguments.only or ("",))
    names = [name for name in CASES if name.startswith(begins)]
    if not names:
        hint = did_you_mean(begins[0], CASES, otherwise=f"one of {', '.join(CASES)}")
        raise UserError(f"no case begins with {begins[0]}; {hint}")
    print("| hostile file | on disk | seconds | memory | answer |\n|---|---|---|---|---|")
    broken = 0
    for name in names:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            outcome = measure(CASES[name], Path(temporary))
            size = sum(512 * p.lstat().st_blocks for p in Path(temporary).iterdir())
            answer = outcome.answer.replace(f"{temporary}/", "").replace("|", r"\|")
        broken += not kept(outcome)
        mark = "" if kept(outcome) else "**broken** "
        print(
            f"| {name} | {bounded.size_text(size)} | {outcome.seconds:.2f} "
            f"| {outcome.growth >> 20} MiB | {mark}{shortened(answer, 120)} |",
            flush=True,
        )
    print(
        f"\n{len(names)} files, {broken} broken: at most {SECONDS:.0f} s and "
        f"{bounded.size_text(MEMORY)} each"
    )
    return int(broken > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
