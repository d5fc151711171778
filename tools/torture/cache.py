"""Mistreat the file of ``--cache disk``, and compare every pixel that comes out of it.

    python -m tools.torture cache --number 300

The numbers are rounds of each kind. *Kills*: two runs, each with loader workers, fill one file and
are killed with SIGKILL at a random moment, all of a run or a single worker; the file is left as it
is for the next round, until it is full. *Flips*: a few bits, a sector of zeros or of noise, or the
end cut off, then an epoch. *Full disks*: an epoch on a file system of a random size (needs root).
After each round every image must come out with the pixels that it has without a cache, and what
the index has must be whole. One wrong pixel is a failure, and so is an error. All of it is done
with JPEG files and with bands of 16 bits.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import RGB, Form
from config import AugmentOptions
from pipeline.dataset import ImageDataset
from pipeline.disk_cache import DiskOptions, DiskSource, disk_cached
from pipeline.image_file import HEADER_BYTES, ROW_BYTES
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import FileSource
from samplers import ShuffleSampler
from tools.common import command

IMAGES = 24
RUNS = 2
LONGEST = 0.25  # seconds after which a run is killed
SECTOR = 4096  # bytes
SIDE = 48
FORMS = {"colours": RGB, "bands of 16 bits": Form(5, 16)}
HEADER = (
    "| what | rounds | images compared | damaged and noticed | wrong pixels |\n"
    "|---|---|---|---|---|"
)


@dataclass
class Result:
    """What came of the rounds of one kind."""

    name: str
    rounds: int = 0
    compared: int = 0
    noticed: int = 0
    wrong: int = 0

    def row(self) -> str:
        return f"| {self.name} | {self.rounds} | {self.compared} | {self.noticed} | {self.wrong} |"


class Subject:
    """Images, the way they are loaded, and the pixels that they have without a cache."""

    def __init__(self, folder: Path, form: Form = RGB) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        suffix = "jpg" if form == RGB else "npy"
        paths = [folder / "set" / f"{number}.{suffix}" for number in range(IMAGES)]
        paths[0].parent.mkdir(parents=True)
        for number, path in enumerate(paths):
            size = (60 + number % 9, 90 + number % 7, form.channels)
            if form == RGB:
                Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path, quality=92)
            else:
                np.save(path, rng.integers(0, 65536, size, dtype=np.uint16))
        values = (0.5,) * form.channels
        shape = Preprocessing(40, 0.875, "bicubic", values, values, bit_depth=form.bit_depth)
        colours = {} if form == RGB else {"aa": None, "color_jitter": None}
        augment = BatchAugment(shape, AugmentOptions(**colours), 0)
        names = [path.name for path in paths]
        source = FileSource(folder / "set", names, [0] * IMAGES, ["one"])
        self.dataset = ImageDataset(source, augment, is_train=True)
        never = self.loader(folder / "never", limit=1)
        self.want = [never.dataset.source.open(number) for number in range(IMAGES)]

    def loader(
        self, folder: Path, *, limit: int = 1 << 40, workers: int = 0, seed: int = 0
    ) -> Loader:
        """A loader of the images, kept in ``folder``."""
        settings = LoaderSettings(batch_size=4, num_workers=workers)
        plain = Loader(self.dataset, ShuffleSampler(IMAGES, seed=seed), settings)
        return disk_cached(plain, DiskOptions(str(folder), limit, SIDE), visible=False)

    def check(self, source: DiskSource, result: Result) -> None:
        """Compare every image that ``source`` gives, twice."""
        for number in [*range(IMAGES), *range(IMAGES)]:
            result.compared += 1
            result.wrong += not np.array_equal(source.open(number), self.want[number])
        result.noticed += sum(_times(text) for text in source.news())
        result.rounds += 1


def _times(text: str) -> int:
    """The number in what is said of damaged images."""
    words = text.split()
    return int(words[2]) if "damaged" in words else 0


# --- kills ----------------------------------------------------------------------------------------


def _fill(subject: Subject, folder: Path, seed: int) -> None:
    """What a run does, in a process of its own."""
    torch.set_num_threads(1)
    loader = subject.loader(folder, workers=1 + seed % 2, seed=seed)
    for epoch in range(100):
        loader.sampler.set_epoch(epoch)
        for _ in loader:
            pass


def _started(subject: Subject, folder: Path, seed: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _fill(subject, folder, seed)
    finally:
        os._exit(0)


def kills(subject: Subject, rng: random.Random, rounds: int, result: Result) -> None:
    """Runs that fill one file are killed."""
    folder = subject.folder / "killed"
    for number in range(rounds):
        pids = [_started(subject, folder, rng.randrange(1000)) for _ in range(RUNS)]
        time.sleep(rng.uniform(0.02, LONGEST))
        with contextlib.suppress(ProcessLookupError):
            if rng.random() < 0.3:
                workers = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split()
                for worker in workers[:1]:
                    os.kill(int(worker), signal.SIGKILL)
                time.sleep(0.02)
        for pid in pids:
            for kill in (os.killpg, os.kill):  # it may not lead its group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        loader = subject.loader(folder)
        images = loader.dataset.source.images
        there = np.flatnonzero(images.file.there())
        for index in there.tolist():
            found = images.pixels(index, images.row(index)[0])
            result.wrong += found is None or not np.array_equal(found, subject.want[index])
            result.compared += 1
        result.rounds += 1
        path = images.file.path
        del loader, images
        if len(there) == IMAGES or number % 10 == 9:
            path.unlink()


# --- damage ---------------------------------------------------------------------------------------


def _damage(path: Path, rng: random.Random) -> None:
    """What disks do to a file."""
    size = path.stat().st_size
    index = HEADER_BYTES + IMAGES * ROW_BYTES
    start, end = (HEADER_BYTES, index) if rng.random() < 0.3 else (index, size)
    kind = rng.choice(("bit", "bits", "zeros", "noise", "cut"))
    with open(path, "r+b") as file:
        if kind == "cut":
            file.truncate(rng.randrange(index, size))
            return
        if kind in ("zeros", "noise"):
            sector = rng.randrange(start, end) // SECTOR * SECTOR
            length = min(SECTOR, size - sector)
            file.seek(max(sector, HEADER_BYTES))
            file.write(bytes(length) if kind == "zeros" else rng.randbytes(length))
            return
        for _ in range(1 if kind == "bit" else rng.randrange(2, 9)):
            place = rng.randrange(start, end)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def flips(subject: Subject, rng: random.Random, rounds: int, result: Result) -> None:
    """The file is damaged under a run that has it open, or between two runs."""
    folder = subject.folder / "damaged"
    loader = subject.loader(folder)
    subject.check(loader.dataset.source, Result(""))  # fills it
    for number in range(rounds):
        path = loader.dataset.source.images.file.path
        _damage(path, rng)
        if rng.random() < 0.5:
            loader = subject.loader(folder)
        subject.check(loader.dataset.source, result)
        if number % 50 == 49:  # what was replaced stays in the file
            del loader
            path.unlink()
            loader = subject.loader(folder)
            subject.check(loader.dataset.source, Result(""))


# --- full disks -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of that size; raises CalledProcessError without the right to mount."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disks(subject: Subject, rng: random.Random, rounds: int, result: Result) -> None:
    """The disk is full at some moment of the epoch that fills the file, and has room later."""
    for _ in range(rounds):
        try:
            with _disk(subject.folder / "disk", rng.randrange(16, 600)) as disk:
                source = subject.loader(disk).dataset.source
                source.images.reserve = -(1 << 30)  # as if others had taken it meanwhile
                subject.check(source, result)
                grown = ["mount", "-o", "remount,size=4m", str(disk)]
                subprocess.run(grown, check=True, capture_output=True)
                source = subject.loader(disk).dataset.source
                subject.check(source, result)
                result.wrong += not source.images.file.there().all()
                del source
        except subprocess.CalledProcessError:
            print("full disks: left out, mounting a file system needs root", flush=True)
            return


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture cache", __doc__)
    number = command.positive
    parser.add_argument("--number", type=number, default=300, help="of each kind (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens (default: 0)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    results = []
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        kinds = (("kills", kills), ("damage", flips), ("full disks", full_disks))
        for what, form in FORMS.items():
            subject = Subject(Path(temporary) / what, form)
            for name, mistreat in kinds:
                results.append(Result(f"{name}, {what}"))
                mistreat(subject, rng, arguments.number, results[-1])
                print(results[-1].row(), flush=True)
    wrong = sum(result.wrong for result in results)
    print(f"\n{sum(result.compared for result in results)} images compared, {wrong} wrong")
    return int(bool(wrong))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
