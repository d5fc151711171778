"""Kill training with SIGKILL at random moments, resume it, compare with a run left alone.

    python -m tools.torture kills --number 500

Each configuration is trained once without disturbance. Then it is started with ``--resume auto``,
disturbed, and started again until it is done. What is killed is all of it, one of its processes, or
a loader worker, idle or at work, over which the run has to go on by itself; some sessions get
SIGTERM or SIGINT instead. The moment is a random one, or one while a checkpoint is being written,
before there is any, or when the log or TensorBoard's files are ahead of the newest checkpoint.
After each the newest checkpoint must be readable. In the end weights, average, optimiser, schedule,
counters, ``log.txt`` and TensorBoard's records must be bitwise those of the first run, each record
once, in the files and as TensorBoard shows them.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import outputs.events
import training.run
from checkpointing.files import load_checkpoint
from checkpointing.folder import checkpoints_in
from errors import CheckpointError
from tools.common import command
from tools.torture.comparing import differences
from tools.torture.processes import abort, kill, kill_one, loaders_of, plain_curves, start, wait

# Imported here, so that not each session has to.
PRELOADED = (outputs.events, training.run)
PATIENCE = 120.0  # seconds in which a session must be at its end that is to end by itself
BASE = (
    *("--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu", "--epochs", "3"),
    *("--warmup-epochs", "1", "--lr", "0.01", "--log-interval", "2"),
)
EVERY = ("--save-every-steps", "1")
LOADERS = ("--num-workers", "2", "--cache", "none", "--on-bad-image", "skip")
# Stand for paths beside the images.
BANDS, CACHE = "bands/list.csv", "cache"
CONFIGURATIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DeiT recipe, no workers": (1, (*EVERY, "--batch-size", "4", "--num-workers", "0")),
    "DeiT recipe, a checkpoint per epoch": (
        1,
        ("--batch-size", "4", "--num-workers", "0", "--tb-histograms"),
    ),
    "DeiT recipe, two workers": (1, (*LOADERS, "--batch-size", "4", "--save-every-steps", "4")),
    "accumulation, bf16, dropout, one-cycle": (
        1,
        (
            *(*EVERY, "--batch-size", "2", "--num-workers", "0", "--accum-steps", "3"),
            *("--amp", "bf16", "--drop", "0.1", "--sched", "onecycle"),
        ),
    ),
    "fp16 scaler, SGD, plateau": (
        1,
        (
            *(*EVERY, "--batch-size", "4", "--num-workers", "0", "--amp", "fp16", "--opt", "sgd"),
            *("--sched", "plateau", "--patience-epochs", "0", "--ThreeAugment"),
        ),
    ),
    "two processes": (2, (*EVERY, "--batch-size", "2", "--num-workers", "0")),
    "two processes, two workers each": (2, (*LOADERS, "--batch-size", "2")),
    "two processes, FSDP2": (2, (*EVERY, "--batch-size", "2", "--num-workers", "0", "--fsdp")),
    "LoRA": (1, (*EVERY, "--batch-size", "4", "--num-workers", "0", "--lora", "2")),
    "LoRA, two processes": (
        2,
        (*EVERY, "--batch-size", "2", "--num-workers", "0", "--lora", "2", "--lora-alpha", "3"),
    ),
    "several labels, four bands of 16 bits": (
        1,
        (
            *(*EVERY, "--batch-size", "4", "--num-workers", "0", "--task", "multilabel"),
            *("--data-set", "CSV", "--data-path", BANDS, "--val-fraction", "0.25"),
            *("--in-chans", "4", "--bit-depth", "16", "--cutmix", "0.5"),
        ),
    ),
    "train sizes, disk cache, two workers": (
        1,
        (
            *("--batch-size", "4", "--save-every-steps", "2", "--num-workers", "2"),
            *("--on-bad-image", "skip", "--input-size", "12", "--train-sizes", "8:0", "12:1"),
            *("--cache", "disk", "--cache-dir", CACHE),
        ),
    ),
}


@dataclass
class Result:
    """What came of one configuration."""

    name: str
    sessions: int = 0
    whole: int = 0
    ranks: int = 0
    loaders: int = 0
    stops: int = 0
    in_save: int = 0
    unreadable: int = 0
    hung: int = 0
    stuck_at: list[str] = field(default_factory=list)
    """What those that did not end wrote last, and what they were at."""
    differences: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.whole + self.ranks + self.loaders

    def row(self) -> str:
        return (
            f"| {self.name} | {self.sessions} | {self.whole} | {self.ranks} | {self.loaders} "
            f"| {self.stops} | {self.in_save} | {self.unreadable} | {self.hung} "
            f"| {len(self.differences)} |"
        )


HEADER = (
    "| configuration | sessions | kills of all | of one rank | of a loader | signals "
    "| while writing | unreadable checkpoints | not at an end | differences |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
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


def make_bands(root: Path) -> None:
    """``list.csv`` of 32 images of four bands of 16 bits, with two labels, one of them or none."""
    root.mkdir()
    rng = np.random.default_rng(1)
    rows = ["path,labels"]
    for i in range(32):
        has = [label for label in ("dry", "wet") if rng.random() < 0.5]
        pixels = rng.integers(0, 30_000 + 15_000 * len(has), (12, 12, 4)).astype(np.uint16)
        np.save(root / f"{i}.npy", pixels)
        rows.append(f"{i}.npy,{'|'.join(has)}")
    (root / "list.csv").write_text("\n".join(rows) + "\n")


# --- moments ------------------------------------------------------------------------------------


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folder.glob(".checkpoint-*.tmp*"))


def _changed(*paths: Path) -> int:
    """When one of the files was last written; 0 without any."""
    times = [0]
    for path in paths:
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:  # removed since
            continue
    return max(times)


def before_any(folder: Path) -> bool:
    """Whether there is something to log and no checkpoint yet."""
    return bool(_changed(*folder.glob("tensorboard/*"))) and not checkpoints_in(folder)


def events_ahead(folder: Path) -> bool:
    """Whether TensorBoard's files are newer than the newest checkpoint."""
    return _changed(*folder.glob("tensorboard/*")) > (_changed(*checkpoints_in(folder)) or 1 << 63)


def log_ahead(folder: Path) -> bool:
    """Whether ``log.txt`` is: an epoch was evaluated and isn't saved yet."""
    return _changed(folder / "log.txt") > (_changed(*checkpoints_in(folder)) or 1 << 63)


def at_any_time(folder: Path) -> bool:
    return True


MOMENTS = (at_any_time, at_any_time, writing, writing, before_any, events_ahead, log_ahead)


# --- sessions -----------------------------------------------------------------------------------


def disturb(pids: list[int], result: Result, folder: Path, rng: random.Random) -> bool:
    """Kill or stop something of a session; whether it goes on."""
    loaders = [loader for pid in pids for loader in loaders_of(pid)]
    kinds = ["whole", "whole", "stop"]
    kinds += ["loader"] * 4 * bool(loaders) + ["rank"] * 2 * (len(pids) > 1)
    kind = rng.choice(kinds)
    result.in_save += kind != "stop" and writing(folder)
    if kind == "loader":
        result.loaders += kill_one(rng.choice(loaders))
        return True
    if kind == "whole":
        result.whole += 1
        kill(pids)
        return False
    if kind == "rank":
        # The others notice.
        result.ranks += kill_one(rng.choice(pids))
    else:
        result.stops += 1
        for pid in pids:
            os.kill(pid, rng.choice((signal.SIGTERM, signal.SIGINT)))
    if wait(pids, time.monotonic() + PATIENCE) is None:
        result.hung += 1
        result.stuck_at += abort(pids, folder.with_suffix(".txt"))
    return False


def torture(name: str, images: Path, folder: Path, kills: int, rng: random.Random) -> Result:
    """Disturb one configuration ``kills`` times (fewer if it is done before) and compare."""
    world, options = CONFIGURATIONS[name]
    places = {place: str(images.parent / place) for place in (BANDS, CACHE)}
    base = [*BASE, "--data-path", str(images), *(places.get(o, o) for o in options)]
    whole, parts = folder / "whole", folder / "parts"
    began = time.monotonic()
    codes = wait(start([*base, "--output-dir", str(whole)], world, folder / "whole.txt"), 1e18)
    if any(codes or [1]):
        said = " / ".join(_end_of(folder / "whole.txt"))
        raise SystemExit(f"{name}: the undisturbed run failed: {said}")
    seconds = time.monotonic() - began
    shutil.rmtree(places[CACHE], ignore_errors=True)  # filled again under kills
    result = Result(name)
    argv = [*base, "--output-dir", str(parts), "--resume", "auto"]
    codes = None
    while codes is None:
        result.sessions += 1
        pids = start(argv, world, folder / "parts.txt")
        goes_on = True
        while goes_on:
            moment: Callable[[Path], bool] = rng.choice(MOMENTS)
            delay = rng.uniform(0, seconds * (0.6 if moment is at_any_time else 0.3))
            deadline = time.monotonic() + delay if result.kills < kills else 1e18
            codes = wait(pids, deadline, lambda moment=moment: moment(parts))
            goes_on = codes is None and disturb(pids, result, parts, rng)
        try:
            for path in checkpoints_in(parts)[:1]:
                load_checkpoint(path)
        except CheckpointError:
            result.unreadable += 1
    if any(codes):
        result.differences = [f"a session ended with {codes}", *_end_of(folder / "parts.txt")]
    else:
        result.differences = differences(whole, parts)
    return result


def _end_of(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-3:]


def run(kills: int, names: Sequence[str], seed: int) -> list[Result]:
    """Torture the named configurations, ``kills`` times in all, spread evenly."""
    rng = random.Random(seed)
    plain_curves()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        make_images(images)
        make_bands(images.parent / "bands")
        for number, name in enumerate(names):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            left = kills - sum(r.kills for r in results)
            share = -(-left // (len(names) - number))
            total = Result(name)
            # A configuration that was done before its share is taken again.
            while total.kills < share:
                attempt = folder / str(total.sessions)
                attempt.mkdir()
                _add(total, torture(name, images, attempt, share - total.kills, rng))
            results.append(total)
            print(total.row(), flush=True)
            for line in total.stuck_at + total.differences[:20]:
                print(f"  {line}", flush=True)
    return results


def _add(total: Result, more: Result) -> None:
    for key, value in vars(more).items():
        if key != "name":
            setattr(total, key, getattr(total, key) + value)


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture kills", __doc__)
    number = command.positive
    parser.add_argument("--number", type=number, default=50, help="kills in all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--only", default="", help="configurations whose name holds this text")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    names = [name for name in CONFIGURATIONS if arguments.only in name]
    print(HEADER, flush=True)
    outcome = run(arguments.number, names, arguments.seed)
    bad = sum(len(r.differences) + r.unreadable + r.hung for r in outcome)
    print(
        f"\n{sum(r.kills for r in outcome)} kills and {sum(r.stops for r in outcome)} signals in "
        f"{sum(r.sessions for r in outcome)} sessions: {bad} differences, unreadable checkpoints "
        "or sessions that did not end"
    )
    return int(bool(bad))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
