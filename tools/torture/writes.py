"""Refuse every write of a training once, in turn, and see what becomes of it.

    python -m tools.torture writes

A training of three epochs with TensorBoard notes each operation that changes a file of its folder:
opening for writing, write, fsync, rename, link, unlink, mkdir, truncate. Then it is trained once
for each of them, and just that one fails, with one of ENOSPC, EIO, EROFS, EACCES, EDQUOT. It must
come to its end, with exit code 0, or 1 if the last checkpoint or ``best.pth`` is missing or is not
that of the epoch that is said to be the best; or be refused before anything is trained, in one
line. ``log.txt`` and TensorBoard must be whole, and the newest checkpoint right. The same command
again must end with 0 and leave all as the undisturbed training does, and nothing half-written.
"""

import argparse
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import main as program
from checkpointing.files import load_checkpoint
from checkpointing.folder import BEST, checkpoints_in
from errors import CheckpointError
from tools.common import command
from tools.torture.comparing import differing, log_of, tensorboard_differences
from tools.torture.kills import make_images
from tools.torture.processes import kill, plain_curves, start, wait
from tools.torture.refusing import Refusal, install

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT)
PATIENCE = 120.0  # seconds until a training hangs
BASE = (
    *("--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu", "--epochs", "3"),
    *("--warmup-epochs", "1", "--lr", "0.01", "--log-interval", "2", "--num-workers", "0"),
    # So each epoch is the best one so far.
    *("--best-metric", "train_loss", "--aa", "none", "--color-jitter", "none", "--reprob", "0"),
    *("--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--drop-path", "0", "--resume", "auto"),
)
KINDS = {
    "one process": (1, ("--batch-size", "4", "--keep", "1")),
    "two processes, FSDP2": (2, ("--batch-size", "2", "--keep", "1", "--fsdp")),
    "LoRA, a trace and a tracker": (
        1,
        (
            *("--batch-size", "4", "--keep", "1", "--lora", "2"),
            *("--profile", "2", "--log-to", "wandb"),
        ),
    ),
}
_WRONG = ("ended", "hung", "wrong_code", "wrong_best", "wrong_newest", "torn", "left")


@dataclass
class Result:
    """What came of the refusals of one kind of training."""

    name: str
    refused: int = 0
    at_start: int = 0
    missing: int = 0
    ended: int = 0
    hung: int = 0
    wrong_code: int = 0
    wrong_best: int = 0
    wrong_newest: int = 0
    torn: int = 0
    left: int = 0
    lines: list[str] = field(default_factory=list)

    def wrong(self, what: str, where: str, detail: object) -> None:
        setattr(self, what, getattr(self, what) + 1)
        self.lines.append(f"{what}: {where}: {detail}")

    @property
    def bad(self) -> int:
        return sum(getattr(self, name) for name in _WRONG)

    def row(self) -> str:
        values = [getattr(self, n) for n in ("refused", "at_start", "missing", *_WRONG)]
        return f"| {self.name} | {' | '.join(map(str, values))} |"


HEADER = (
    "| training | writes refused | refused at the start | ended with 1 | runs ended | hung "
    "| wrong exit code | wrong best | wrong newest | logs not whole | left behind |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


class Training:
    """One kind of training, undisturbed and with refusals."""

    def __init__(self, name: str, images: Path, folder: Path) -> None:
        self.world, options = KINDS[name]
        self.argv = [*BASE, "--data-path", str(images), *options]
        self.folder = folder
        self.all = folder / "all"  # with each epoch's checkpoint
        self.whole = folder / "whole"
        assert self.train(self.all, Refusal(self.all), "--keep", "9")[0] == 0
        notes = folder / "notes.txt"
        assert self.train(self.whole, Refusal(self.whole, notes=notes))[0] == 0
        self.operations = list(dict.fromkeys(notes.read_text().splitlines()))

    def train(self, folder: Path, refusal: Refusal, *more: str) -> tuple[int | None, str]:
        """The exit code, None if it hangs, and what was printed."""
        log = folder.with_name(f"{folder.name}.txt")
        log.unlink(missing_ok=True)
        argv = [*self.argv, "--output-dir", str(folder), *more]
        usual, program.main = program.main, partial(_refusing, refusal, program.main)
        try:
            pids = start(argv, self.world, log)
        finally:
            program.main = usual
        codes = wait(pids, time.monotonic() + PATIENCE)
        if codes is None:
            kill(pids)
        code = None if codes is None else max(codes)
        return code, log.read_text(errors="replace")

    def refuse(self, operation: str, number: int, result: Result) -> None:
        """Train with that operation refused, look, train again, look."""
        folder = self.folder / "run"
        where = f"{operation} {errno.errorcode[number]}"
        code, shown = self.train(folder, Refusal(folder, refused=operation, number=number))
        result.refused += 1
        if code is None:
            result.wrong("hung", where, shown[-300:])
        elif code == 2 and "epoch 1" not in shown and shown.count("error: ") == self.world:
            result.at_start += 1
        elif code not in (0, 1) or "Traceback" in shown:
            result.wrong("ended", where, shown[-300:])
        else:
            self._look(folder, code, shown, where, result)
        code, shown = self.train(folder, Refusal(folder))
        where = f"{where}, the session after it"
        if code != 0:
            result.wrong("ended", where, shown[-300:])
        else:
            self._look(folder, code, shown, where, result)
        names = {str(p.relative_to(folder)) for p in folder.rglob("*")}
        own = [name for name in names if not name.startswith("wandb/")]
        odd = [n for n in own if ".tmp" in n or n.endswith((".old", ".lock", ".writable"))]
        if odd:
            result.wrong("left", where, odd)
        shutil.rmtree(folder)

    def _look(self, folder: Path, code: int, shown: str, where: str, result: Result) -> None:
        """Compare what is there with the undisturbed training, and with what was said."""
        last = checkpoints_in(self.all)[0]
        newest = next(iter(checkpoints_in(folder)), None)
        if newest is None or self._differs(newest, newest.name):
            result.wrong("wrong_newest", where, newest)
        said = re.search(r"^best .* after epoch (\d+)$", shown, re.M)
        own = f"checkpoint-{int(said[1]) if said else 3:04d}{last.suffix}"
        best_right = not self._differs(folder / BEST, own)
        whole = best_right and newest is not None and newest.name == last.name
        result.missing += code == 1
        if code == 0 and not best_right:
            result.wrong("wrong_best", where, said and said[0])
        elif (code == 0) != whole:
            result.wrong("wrong_code", where, f"{code}, newest {newest}, best right: {best_right}")
        torn = differing(log_of(self.whole), log_of(folder), "log.txt")
        if torn := torn + tensorboard_differences(self.whole, folder):
            result.wrong("torn", where, torn[:3])

    def _differs(self, path: Path, name: str) -> bool:
        """Whether the weights at ``path`` are not those of the checkpoint ``name``."""
        try:
            contents = [load_checkpoint(p) for p in (path, self.all / name)]
        except CheckpointError:
            return True
        keys = ("model", "model_ema", "progress")
        return bool(differing(*({k: c[k] for k in keys} for c in contents), ""))


def _refusing(refusal: Refusal, train: partial, argv: Sequence[str]) -> int:
    """What a forked process runs."""
    install(refusal)
    return train(argv)


def run(kind: str, number: int, errors: Sequence[int]) -> Result:
    """Refuse ``number`` operations of a training, spread evenly over all of them."""
    result = Result(kind)
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        make_images(images)
        training = Training(kind, images, Path(temporary))
        operations = training.operations
        step = max(len(operations) / number, 1.0)
        chosen = [operations[int(i * step)] for i in range(min(number, len(operations)))]
        print(f"<!-- {kind}: {len(operations)} operations, {len(chosen)} refused -->", flush=True)
        for i, operation in enumerate(chosen):
            training.refuse(operation, errors[i % len(errors)], result)
    print(result.row(), flush=True)
    for line in result.lines[:40]:
        print(f"  {line}", flush=True)
    return result


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture writes", __doc__)
    parser.add_argument(
        "--number", type=int, default=10_000, help="refusals at most (default: all)"
    )
    parser.add_argument(
        "--tracked",
        type=int,
        default=60,
        help="refusals of one process with LoRA, a trace and a tracker (default: 60)",
    )
    parser.add_argument(
        "--fsdp", type=int, default=40, help="refusals of two processes with FSDP (default: 40)"
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    plain_curves()  # nobody compares them
    os.environ |= {"WANDB_MODE": "offline"}
    print(HEADER, flush=True)
    numbers = (arguments.number, arguments.fsdp, arguments.tracked)
    results = [run(kind, n, ERRORS) for kind, n in zip(KINDS, numbers, strict=True) if n]
    bad = sum(result.bad for result in results)
    print(f"\n{sum(r.refused for r in results)} writes refused, {bad} promises broken")
    return int(bool(bad))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
