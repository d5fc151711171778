"""Kill training with SIGKILL at random moments, resume it, compare with a run left alone.

    python -m tools.torture kills --number 50

Each configuration is trained once without disturbance. Then it is started with ``--resume auto``,
killed, and started again until it is done: half of the kills come at a random moment, half while a
checkpoint is being written. After each kill the newest checkpoint must be readable; in the end
weights, average, optimiser, schedule, counters and log must be bitwise those of the first run.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpointing.files import load_checkpoint
from checkpointing.folder import checkpoints_in, load_newest
from errors import CheckpointError
from tools.common import command
from tools.torture.processes import kill, start, wait

BASE = (
    *("--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu", "--epochs", "3"),
    *("--warmup-epochs", "1", "--lr", "0.01", "--save-every-steps", "1", "--no-tensorboard"),
)
CONFIGURATIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DeiT recipe, no workers": (1, ("--batch-size", "4", "--num-workers", "0")),
    "DeiT recipe, two workers": (1, ("--batch-size", "4", "--num-workers", "2")),
    "accumulation, bf16, dropout, one-cycle": (
        1,
        (
            *("--batch-size", "2", "--num-workers", "0", "--accum-steps", "3", "--amp", "bf16"),
            *("--drop", "0.1", "--sched", "onecycle"),
        ),
    ),
    "fp16 scaler, SGD, plateau": (
        1,
        (
            *("--batch-size", "4", "--num-workers", "0", "--amp", "fp16", "--opt", "sgd"),
            *("--sched", "plateau", "--patience-epochs", "0", "--ThreeAugment"),
        ),
    ),
    "two processes": (2, ("--batch-size", "2", "--num-workers", "0")),
    "two processes, FSDP2": (2, ("--batch-size", "2", "--num-workers", "0", "--fsdp")),
}


@dataclass
class Result:
    """What came of one configuration."""

    name: str
    kills: int = 0
    kills_in_save: int = 0
    sessions: int = 0
    unreadable: int = 0
    differences: int = 0

    def row(self) -> str:
        return (
            f"| {self.name} | {self.sessions} | {self.kills} | {self.kills_in_save} "
            f"| {self.unreadable} | {self.differences} |"
        )


HEADER = (
    "| configuration | sessions | kills | while writing | unreadable checkpoints | differences |\n"
    "|---|---|---|---|---|---|"
)


def make_images(root: Path) -> None:
    """24 training and 6 validation images of three classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for label in range(3):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60 * label, 60 * label + 120, (12, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folder.glob(".checkpoint-*.tmp*"))


def torture(name: str, images: Path, folder: Path, kills: int, rng: random.Random) -> Result:
    """Kill one configuration ``kills`` times (fewer if it is done before) and compare."""
    world, options = CONFIGURATIONS[name]
    base = [*BASE, "--data-path", str(images), *options]
    whole, parts = folder / "whole", folder / "parts"
    began = time.monotonic()
    codes = wait(start([*base, "--output-dir", str(whole)], world, folder / "whole.txt"), 1e18)
    if any(codes or [1]):
        raise SystemExit(f"{name}: the undisturbed run failed, see {folder / 'whole.txt'}")
    seconds = time.monotonic() - began
    result = Result(name)
    argv = [*base, "--output-dir", str(parts), "--resume", "auto"]
    while True:
        result.sessions += 1
        pids = start(argv, world, folder / "parts.txt")
        in_save = rng.random() < 0.5
        delay = rng.uniform(0, seconds * (0.2 if in_save else 0.5))
        deadline = time.monotonic() + delay if result.kills < kills else 1e18
        codes = wait(pids, deadline, partial(writing, parts) if in_save else lambda: True)
        if codes is not None:
            if any(codes):
                raise SystemExit(f"{name}: a session failed, see {folder / 'parts.txt'}")
            break
        result.kills_in_save += writing(parts)
        kill(pids)
        result.kills += 1
        found = checkpoints_in(parts)
        try:
            if found:
                load_checkpoint(found[0])
        except CheckpointError:
            result.unreadable += 1
    result.differences = differences(whole, parts)
    return result


def differences(left: Path, right: Path) -> int:
    """Values that differ between the last checkpoints and logs of two runs."""
    contents = [load_newest(folder)[1] for folder in (left, right)]
    for content in contents:
        for name in ("rng", "metrics", "versions"):  # metrics hold times; the log is compared
            del content[name]
    lines = [(folder / "log.txt").read_text().splitlines() for folder in (left, right)]
    logs = [[_untimed(line) for line in each] for each in lines]
    return count_differences(*contents) + count_differences(*logs)


def _untimed(line: str) -> dict[str, Any]:
    return {k: v for k, v in json.loads(line).items() if k != "epoch_seconds"}


def count_differences(left: Any, right: Any) -> int:
    if isinstance(left, torch.Tensor):
        return int(not torch.equal(left, right))
    if isinstance(left, dict):
        return sum(count_differences(left.get(k), right.get(k)) for k in left.keys() | right.keys())
    if isinstance(left, list | tuple):
        return abs(len(left) - len(right)) + sum(map(count_differences, left, right))
    return int(left != right)


def run(kills: int, names: Sequence[str], seed: int) -> list[Result]:
    """Torture the named configurations, ``kills`` times in all, spread evenly."""
    rng = random.Random(seed)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        make_images(images)
        for number, name in enumerate(names):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            left = kills - sum(r.kills for r in results)
            share = -(-left // (len(names) - number))
            # A configuration that was done before its share is taken again.
            while share > 0:
                attempt = folder / str(len(results))
                attempt.mkdir()
                results.append(torture(name, images, attempt, share, rng))
                print(results[-1].row(), flush=True)
                share -= results[-1].kills
    return results


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture kills", __doc__)
    number = command.positive
    parser.add_argument("--number", type=number, default=50, help="kills in all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    print(HEADER, flush=True)
    outcome = run(arguments.number, list(CONFIGURATIONS), arguments.seed)
    bad = sum(r.differences + r.unreadable for r in outcome)
    print(f"\n{sum(r.kills for r in outcome)} kills, {bad} differences or unreadable checkpoints")
    return int(bool(bad))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
