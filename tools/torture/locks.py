"""Start runs in one folder at the same moment: one may hold it, and one must.

    python -m tools.torture locks --number 1000

Two, four or eight processes wait at a barrier and then all take the lock of one folder, over what a
dead run may have left there: nothing, its lock, half of one, or the lock of a run on another host.
A holder notes when it came in and when it left, stays for some milliseconds, and then gives the
folder free or dies with it. In some starts one process is killed with SIGKILL meanwhile. Two
holders at a time, or a start where none became the holder, are failures, and so is an error other
than the refusal. ``--without-flock`` is a file system without locks, where less is promised.
"""

import argparse
import errno
import fcntl
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errors import OptionError
from tools.common import command
from training.lock import LOCK_FILE, RunLock

STARTERS = (2, 4, 8)
LONG_AGO = 3600.0  # seconds


@dataclass
class Result:
    """What came of the starts of one kind."""

    name: str
    starts: int = 0
    holders: int = 0
    killed: int = 0
    double: int = 0
    nobody: int = 0
    errors: list[str] = field(default_factory=list)

    def row(self) -> str:
        return (
            f"| {self.name} | {self.starts} | {self.holders} | {self.killed} "
            f"| {self.double} | {self.nobody} | {len(self.errors)} |"
        )


HEADER = (
    "| what was there | starts | holders | killed | two holders | no holder | other errors |\n"
    "|---|---|---|---|---|---|---|"
)


def _dead_holder(**changed: object) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    holder = {"host": socket.gethostname(), "pid": pid, "started": "1", "job": ""}
    return json.dumps(holder | changed)


LEFT: dict[str, Callable[[], str | None]] = {
    "nothing": lambda: None,
    "the lock of a dead run": _dead_holder,
    "half a lock": lambda: _dead_holder()[:20],
    "the lock of a silent run elsewhere": lambda: _dead_holder(host="elsewhere"),
}


def _take(folder: Path, gate: int, notes: int, seed: str) -> None:
    """What a starter does, in a process of its own; it writes ``what time`` lines."""

    def note(what: str) -> None:
        os.write(notes, f"{what} {os.getpid()} {time.monotonic_ns()}\n".encode())

    rng = random.Random(seed)
    os.read(gate, 1)
    try:
        held = RunLock(folder)
    except OptionError as error:
        note("refused" if "in use by" in str(error) else "error")
        return
    note("in")
    time.sleep(rng.uniform(0, 0.01))
    note("out")
    if rng.random() < 0.5:
        held.release()


def start(left: str | None, starters: int, rng: random.Random, *, kill: bool) -> list[list[str]]:
    """One synchronised start; the lines that its processes noted, and those of who was killed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if left is not None:
            (folder / LOCK_FILE).write_text(left)
            past = time.time() - LONG_AGO
            os.utime(folder / LOCK_FILE, (past, past))
        gate, opening = os.pipe()
        reading, notes = os.pipe()
        pids = []
        for _ in range(starters):
            seed = str(rng.random())
            pid = os.fork()
            if pid == 0:
                os.close(opening)
                code = 1
                try:
                    _take(folder, gate, notes, seed)
                    code = 0
                except BaseException as error:
                    os.write(notes, f"error {type(error).__name__} 0\n".encode())
                finally:
                    os._exit(code)
            pids.append(pid)
        os.close(notes)
        os.close(opening)  # the barrier
        killed = []
        if kill:
            time.sleep(rng.uniform(0, 0.01))
            killed = [["killed", str(pids[0]), str(time.monotonic_ns())]]
            os.kill(pids[0], signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        with os.fdopen(reading) as file:
            lines = [line.split() for line in file]
        os.close(gate)
    return lines + killed


def count(result: Result, lines: Sequence[Sequence[str]]) -> None:
    """Count what a start's ``lines`` say."""
    ends = {pid: int(when) for what, pid, when in lines if what == "killed"}
    ends |= {pid: int(when) for what, pid, when in lines if what == "out"}
    held = sorted((int(when), ends[pid]) for what, pid, when in lines if what == "in")
    result.starts += 1
    result.holders += len(held)
    result.killed += sum(what == "killed" for what, *_ in lines)
    pairs = zip(held, held[1:], strict=False)
    result.double += any(left > entry for (_, left), (entry, _) in pairs)
    result.nobody += not held
    result.errors += [pid for what, pid, _ in lines if what == "error"]


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture locks", __doc__)
    number = command.positive
    parser.add_argument("--number", type=number, default=1000, help="starts (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--without-flock", action="store_true", help="pretend that the file system has no locks"
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    rng = random.Random(arguments.seed)
    if arguments.without_flock:
        fcntl.flock = _no_locks
    print(HEADER, flush=True)
    results = []
    for number, (name, left) in enumerate(LEFT.items()):
        result = Result(name)
        for i in range(number, arguments.number, len(LEFT)):
            starters = STARTERS[i // len(LEFT) % len(STARTERS)]
            count(result, start(left(), starters, rng, kill=rng.random() < 0.25))
        print(result.row(), flush=True)
        results.append(result)
    double, nobody = sum(r.double for r in results), sum(r.nobody for r in results)
    errors = [error for r in results for error in r.errors]
    print(f"\n{sum(r.starts for r in results)} starts: {double} with two holders, {nobody} without")
    if errors:
        print(f"other errors: {', '.join(sorted(set(errors)))}")
    return int(bool(double or nobody or errors))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
