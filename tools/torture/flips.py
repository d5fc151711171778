"""Damage checkpoints by single bits and whole sectors, load them, compare with what they were.

    python -m tools.torture flips --number 10000

The files are those of real runs: plain and sharded checkpoints, ``best.pth``, exported weights; and
what other programs write. Each damage is one flipped bit, or for every tenth flip also one sector
of 512 bytes that became zeros, random bytes or a sector of another file. A damaged file must be
refused with one line, or hold what it held; files of other programs have no checksum of the whole,
and what of them is read otherwise than it was written is counted.
"""

import argparse
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import inference
from checkpointing.digest import save_safetensors
from checkpointing.files import load_checkpoint
from checkpointing.folder import BEST, checkpoints_in
from errors import UserError
from tools.common import command
from tools.torture.kills import make_images
from tools.torture.processes import start, wait
from utils import copy_to_host

# So small that much of a file is not tensors.
RUN = (
    *("--model", "modern_lenet", "--input-size", "32", "--device", "cpu", "--epochs", "1"),
    *("--warmup-epochs", "0", "--lr", "0.01", "--no-tensorboard"),
    *("--batch-size", "4", "--num-workers", "0"),
)
SECTOR = 512
END = 8192  # bytes at either end of a file, where its structure is
BATCH = 2000  # damages that a process makes
COUNTS = ("refused", "equal", "different", "errors")

HEADER = (
    "| file | bytes | bits flipped | sectors overwritten | refused | read as before "
    "| silently different | not ours |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Subject:
    """What is damaged."""

    name: str
    path: Path
    """A file, or a folder of a sharded checkpoint."""
    ours: bool
    """Whether it has a checksum of all its bytes."""

    @property
    def files(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]


@dataclass
class Result:
    """What came of one kind of file."""

    subject: Subject
    flips: int = 0
    sectors: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    @property
    def broken(self) -> int:
        """Promises that were not kept."""
        return self.counts["errors"] + self.subject.ours * self.counts["different"]

    def row(self) -> str:
        size = sum(file.stat().st_size for file in self.subject.files)
        shown = " | ".join(str(self.counts[name]) for name in COUNTS)
        return f"| {self.subject.name} | {size} | {self.flips} | {self.sectors} | {shown} |"


def same(left: Any, right: Any) -> bool:
    """Whether two contents are bitwise the same."""
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor):
            return False
        alike = (left.dtype, left.shape) == (right.dtype, right.shape)
        return alike and torch.equal(*(x.flatten().view(torch.uint8) for x in (left, right)))
    if isinstance(left, argparse.Namespace):
        return isinstance(right, argparse.Namespace) and same(vars(left), vars(right))
    if type(left) is not type(right):
        return False
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


def damages(
    rng: random.Random, files: Sequence[Path], flips: int, sectors: int, others: Sequence[Path]
) -> Iterator[tuple[Path, int, bytes]]:
    """(file, place, bytes there from now on); a third of the places each is drawn from all bytes of
    the files, from a file's begin and from its end."""
    sizes = [file.stat().st_size for file in files]
    for number in range(flips + sectors):
        [file] = rng.choices(files, sizes)
        size = file.stat().st_size
        begin, end = rng.choice(((0, size), (0, min(size, END)), (max(0, size - END), size)))
        if number < flips:
            place = rng.randrange(begin, end)
            with open(file, "rb") as opened:
                opened.seek(place)
                [byte] = opened.read(1)
            yield file, place, bytes([byte ^ (1 << rng.randrange(8))])
            continue
        place = rng.randrange(begin, end) // SECTOR * SECTOR
        kind = rng.randrange(3)
        block = bytes(SECTOR) if kind == 0 else rng.randbytes(SECTOR)
        if kind == 2:
            other = rng.choice(others)
            with open(other, "rb") as opened:
                opened.seek(rng.randrange(0, other.stat().st_size, SECTOR))
                block = opened.read(SECTOR).ljust(SECTOR, b"\0")
        yield file, place, block[: size - place]


def load(path: Path) -> list[Any]:
    """What the readers of this project find: without the weights, and with them."""
    rest = inference.read_content(path, weights=False)
    described = {k: v for k, v in rest.items() if k not in ("model", "model_ema", "optimizer")}
    # Of a file without a checksum of the whole, what tensors hold is undefined here.
    # Copied: tensors of safetensors are the file's own bytes.
    content = copy_to_host(inference.read_content(path))
    return [sorted(described), described.get("config"), content]


def outcome(path: Path, expected: Any) -> tuple[str, str]:
    """Which of COUNTS a damaged file comes to, and what was raised if that is an error."""
    try:
        found = load(path)
    except UserError as error:
        return ("errors", str(error)) if "\n" in str(error) else ("refused", "")
    except Exception:
        return "errors", traceback.format_exc()
    return ("equal" if same(found, expected) else "different"), ""


def _batch(subject: Subject, seed: str, flips: int, sectors: int, others: list[Path]) -> dict:
    """Damage, load and mend, in a process of its own; counts, and texts of errors."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"texts": []}
    expected = load(subject.path)
    rng = random.Random(seed)
    for file, place, block in damages(rng, subject.files, flips, sectors, others):
        handle = os.open(file, os.O_RDWR)
        try:
            before = os.pread(handle, len(block), place)
            if before == block:
                block = rng.randbytes(len(block))
            os.pwrite(handle, block, place)
            kind, text = outcome(subject.path, expected)
            os.pwrite(handle, before, place)
        finally:
            os.close(handle)
        counts[kind] += 1
        if text or (kind == "different" and subject.ours):
            counts["texts"].append(f"{file.name}, byte {place}: {kind} {text}")
    return counts


def attack(
    subject: Subject,
    flips: int,
    sectors: int,
    seed: int,
    others: Sequence[Path] = (),
    say: Callable[[str], object] = print,
) -> Result:
    """Damage one subject; a process that ends by a signal counts as an error."""
    result = Result(subject, flips, sectors)
    context = multiprocessing.get_context("fork")
    for number, begin in enumerate(range(0, flips, BATCH)):
        share = min(BATCH, flips - begin)
        part = sectors * (begin + share) // flips - sectors * begin // flips
        receiver, sender = context.Pipe(duplex=False)
        arguments = (subject, f"{seed}/{subject.name}/{number}", share, part, list(others))
        process = context.Process(target=_send, args=(sender, arguments))
        process.start()
        sender.close()
        try:
            counts = receiver.recv()
        except EOFError:
            counts = {"errors": 1, "texts": ["the process that read it ended"]}
        process.join()
        for text in counts.pop("texts"):
            say(f"{subject.name}: {text}")
        for name, count in counts.items():
            result.counts[name] += count
    return result


def _send(sender: Any, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sender.send(_batch(*arguments))


def make_subjects(folder: Path) -> list[Subject]:
    """Train twice, for a few updates, and write what is damaged below ``folder``."""
    images = folder / "images"
    make_images(images)
    for name, world, options in (("plain", 1, ()), ("sharded", 2, ("--fsdp",))):
        argv = [*RUN, "--data-path", str(images), *options, "--output-dir", str(folder / name)]
        if any(wait(start(argv, world, folder / f"{name}.txt"), 1e18) or [1]):
            raise SystemExit(f"the {name} run failed, see {folder / name}.txt")
    plain, sharded = (checkpoints_in(folder / name)[0] for name in ("plain", "sharded"))
    content = load_checkpoint(plain)
    exported = folder / "exported.safetensors"
    save_safetensors(exported, content["model"], inference.metadata_of(content))
    return [
        Subject("checkpoint", plain, ours=True),
        Subject("best.pth", folder / "plain" / BEST, ours=True),
        Subject("sharded checkpoint", sharded, ours=True),
        Subject("exported safetensors", exported, ours=True),
        *_of_others(folder, content["model"]),
    ]


def _of_others(folder: Path, weights: Mapping[str, torch.Tensor]) -> list[Subject]:
    """Files as other programs write them."""
    from safetensors.torch import save_file

    deit = {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.001, model="deit")}
    torch.save(dict(weights), folder / "bare.pth")
    torch.save(deit, folder / "deit.pth")
    torch.save(deit, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(dict(weights), folder / "other.safetensors")
    names = {
        "state dict by torch.save": "bare.pth",
        "DeiT's": "deit.pth",
        "torch.save before zip archives": "old.pth",
        "safetensors of another program": "other.safetensors",
    }
    return [Subject(name, folder / file, ours=False) for name, file in names.items()]


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser("torture flips", __doc__)
    number = command.positive
    parser.add_argument(
        "--number", type=number, default=2000, help="bits flipped in all (default: 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        subjects = make_subjects(Path(temporary))
        print(HEADER, flush=True)
        others = [file for subject in subjects for file in subject.files]
        results = []
        for number, subject in enumerate(subjects):
            left = arguments.number - sum(result.flips for result in results)
            flips = -(-left // (len(subjects) - number))
            if flips:
                results.append(attack(subject, flips, flips // 10, arguments.seed, others))
                print(results[-1].row(), flush=True)
    broken = sum(result.broken for result in results)
    seconds = time.monotonic() - began
    print(f"\n{sum(r.flips for r in results)} flips, {broken} broken promises, {seconds:.0f} s")
    return int(bool(broken))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
