"""Decode image files that mean harm, and measure what each takes.

    python -m tools.torture images

Each file is decoded by both decoders, JPEG files at a part of their size too, in a process of its
own, whose peak memory and time are measured. It must give an image or a BadImageError, in a bounded
time, and in at most BYTES_PER_PIXEL (12) bytes for each pixel of ``--max-image-pixels`` besides the
size of the file.
"""

import argparse
import contextlib
import functools
import os
import resource
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import DataOptions
from pipeline.decoding import DECODERS, decode_tensor
from pipeline.limits import BYTES_PER_PIXEL, BadImageError, limit_pixels
from tools.common import command
from tools.torture.hostile_images import files

BASE = 64 << 20  # bytes that small images take, of libraries too
SECONDS = 60.0  # of a processor's time that a file may take, besides one for each of its MB
PATIENCE = 20  # times as long may pass, on a machine that does much else
SPARSE = 60 << 30
SCALED = {"scaled": functools.partial(decode_tensor, short_side=64)}


class Outcome(NamedTuple):
    """What came of a file."""

    text: str
    """The image's shape, or the reason why there is none."""
    ok: bool
    """Whether that is one of the two."""
    seconds: float
    """Of a processor."""
    peak: int
    """Bytes of memory beyond what the process had before."""


@contextlib.contextmanager
def special_files(folder: Path) -> Iterator[list[tuple[str, Path]]]:
    """What a path may lead to besides a file of pixels."""
    os.mkfifo(folder / "pipe")
    with open(folder / "sparse", "wb") as file:
        file.truncate(SPARSE)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "circle").symlink_to(folder / "circle")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        found = ["pipe", "sparse", "empty", "folder", "circle", "socket", "absent"]
        system = ["/dev/zero", "/dev/urandom", "/dev/full", "/proc/self/maps", "/proc/self/mem"]
        yield [(name, folder / name) for name in found] + [(name, Path(name)) for name in system]


def measured(work: Callable[[], Any], seconds: float) -> Outcome:
    """``work`` in a process of its own, which may take so many seconds of a processor."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        _report(work, writer)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], PATIENCE * seconds)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    with open(reader, encoding="utf-8", errors="replace") as file:
        answer = file.read()
    _, status, usage = os.wait4(pid, 0)
    code, took = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    if not ready or code == -signal.SIGXCPU:
        return Outcome(f"not done after {seconds:.0f} s", False, took, 0)
    if code:
        return Outcome(f"the process died with {code}", False, took, 0)
    peak, ok, text = answer.split(" ", 2)
    return Outcome(text, ok == "1", took, int(peak))


def _report(work: Callable[[], Any], writer: int) -> None:
    """Do the work, write what came of it, and end this process."""
    torch.set_num_threads(1)
    before = _memory("VmRSS")
    try:
        result = work()
        ok, text = 1, str(tuple(getattr(result, "shape", None) or result.size))
    except BadImageError as error:
        ok, text = 1, str(error)
    except BaseException as error:
        ok, text = 0, f"{type(error).__name__}: {error}"
    os.write(writer, f"{max(0, _memory('VmHWM') - before)} {ok} {text}".encode()[:4000])
    os._exit(0)


def _memory(key: str) -> int:
    """Bytes, by the system's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def run(limit: int, wanted: str) -> int:
    """Decode all files whose name holds ``wanted``; returns how many break a promise."""
    limit_pixels(limit)
    broken = 0
    worst = (0, "nothing")
    with tempfile.TemporaryDirectory() as name, special_files(Path(name)) as special:
        path = Path(name) / "image"
        for what, make in [*files(), *special]:
            if wanted not in what:
                continue
            if callable(make):
                # In a process of its own, so that this one's memory stays small.
                made = measured(lambda make=make: _write(path, make(limit)), 10 * SECONDS)
                if not made.ok:
                    raise SystemExit(f"{what} could not be made: {made.text}")
            place = path if callable(make) else make
            size = path.stat().st_size if callable(make) else 0
            ways = DECODERS | (SCALED if "JPEG" in what else {})
            for decoder, decode in ways.items():
                found = measured(
                    lambda decode=decode, place=place: decode(str(place), "white"),
                    SECONDS + size / 1e6,
                )
                allowed = BASE + size + BYTES_PER_PIXEL * limit
                bad = not found.ok or found.peak > allowed
                broken += bad
                worst = max(worst, (found.peak - size, what))
                print(
                    f"| {what} | {size:,} | {decoder} | {found.text[:90]} | {found.seconds:.1f} "
                    f"| {found.peak / 2**20:,.0f} | {'BROKEN' if bad else 'kept'} |",
                    flush=True,
                )
    per_pixel = worst[0] / limit
    print(
        f"\n{broken} promises broken; the most memory is {worst[0] / 2**20:,.0f} MiB besides the "
        f"file ({worst[1]}), {per_pixel:.1f} bytes per pixel of the limit"
    )
    return broken


def _write(path: Path, content: bytes) -> torch.Tensor:
    path.write_bytes(content)
    return torch.zeros(1)


HEADER = (
    "| file | bytes | decoder | result | seconds | peak MiB | promise |\n"
    "|---|---|---|---|---|---|---|"
)


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture images", __doc__)
    parser.add_argument(
        "--max-image-pixels",
        type=command.positive,
        default=DataOptions().max_image_pixels,
        help="the limit that images are made for (default: that of training)",
    )
    parser.add_argument("--only", default="", help="files whose name holds this")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    print(HEADER, flush=True)
    return int(bool(run(arguments.max_image_pixels, arguments.only)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
