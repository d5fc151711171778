"""Feed readers of files, texts and environment variables with inputs that mean harm.

    python -m tools.torture fuzz --number 500000 --seed 0

Only errors that tell the user what is wrong may come out. Whatever else does is a failure: any
other exception, the end of the process, an input that takes too long, memory that grows beyond a
bound. Each kind of failure is kept with its smallest input below ``--out``.
"""

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

from errors import UserError, did_you_mean
from tools.common import command
from tools.torture.targets import Target, all_targets

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 5.0  # that an input may take, in one of two tries
MEMORY = 512 << 20  # bytes that a process may grow by
JOB = 4000  # inputs that a process reads
POLL = 0.02  # seconds

# What a process tells of its inputs, as places of a shared array.
_CURRENT, _BEGAN, _REFUSED, _READ, _OTHER, _SLOWEST, _GROWTH = range(7)

_COLUMNS = ("target", "inputs", "refused", "read", "not ours", "slowest", "memory")
HEADER = f"| {' | '.join(_COLUMNS)} |\n" + "|---" * len(_COLUMNS) + "|"


@dataclass
class Result:
    """What came of one target."""

    name: str
    refused: int = 0
    read: int = 0
    failures: int = 0
    """Exceptions that are not ours, ends of the process, hangs, memory."""
    slowest: float = 0.0
    """Seconds that an input took."""
    growth: int = 0
    """Bytes that a process grew by at its peak."""

    @property
    def inputs(self) -> int:
        return self.refused + self.read + self.failures

    def row(self) -> str:
        return (
            f"| {self.name} | {self.inputs} | {self.refused} | {self.read} | {self.failures} "
            f"| {self.slowest:.2f} s | {self.growth >> 20} MiB |"
        )


def make_input(target: Target, seed: int, number: int) -> Any:
    """The input of that number, always the same."""
    return target.make(random.Random(f"{seed}/{target.name}/{number}"))


def attack(target: Target, given: Any, folder: Path) -> bool | BaseException:
    """Whether ``given`` was read (True) or refused (False); an exception that isn't ours."""
    try:
        target.attack(given, folder)
    except target.ours:
        return False
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    return True


def kind_of(error: BaseException) -> str:
    """The type of an exception, and the innermost line of the project that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "/." not in f.filename]
    inner = own[-1] if own else frames[-1]
    return f"{type(error).__name__}-{Path(inner.filename).stem}-{inner.lineno}"


def keep(folder: Path, kind: str, given: Any, seed: int, number: int, text: str) -> None:
    """Put a failing input into ``folder/kind``, where no smaller one of its kind is."""
    content = given if isinstance(given, bytes) else repr(given).encode("utf-8", "replace")
    place = folder / kind
    file = place / ("input.bin" if isinstance(given, bytes) else "input.txt")
    if file.exists() and file.stat().st_size <= len(content):
        return
    place.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    note = f"seed {seed}, number {number}\n\n{text}"
    (place / "what.txt").write_text(note, encoding="utf-8", errors="backslashreplace")


def _peak() -> int:
    """Bytes that this process had at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_address_space() -> None:
    """More than ``MEMORY`` fails in this process alone, before the machine has none left."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + 4 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


@dataclass
class _Job:
    """A range of the inputs of a target, read by one process after the other."""

    target: Target
    seed: int
    numbers: range
    scratch: Path
    kept: Path
    told: SynchronizedArray = field(
        default_factory=lambda: multiprocessing.get_context("fork").RawArray("d", 7)
    )
    process: ForkProcess | None = None
    slow: int = -1
    """The input that took too long once: a busy machine may be the reason."""

    def start(self) -> None:
        self.told[_CURRENT], self.told[_BEGAN] = self.numbers.start, time.monotonic()
        self.process = multiprocessing.get_context("fork").Process(target=self._work)
        self.process.start()

    def _work(self) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)
        warnings.simplefilter("ignore")
        _limit_address_space()
        peak = _peak()
        with contextlib.chdir(self.scratch):
            for number in self.numbers:
                self.told[_CURRENT] = number
                self.told[_BEGAN] = began = time.monotonic()
                given = make_input(self.target, self.seed, number)
                outcome = attack(self.target, given, self.scratch)
                self.told[_SLOWEST] = max(self.told[_SLOWEST], time.monotonic() - began)
                growth = _peak() - peak
                grew = growth > max(MEMORY, self.told[_GROWTH])
                self.told[_GROWTH] = max(self.told[_GROWTH], growth)
                if isinstance(outcome, BaseException):
                    self.told[_OTHER] += 1
                    text = "".join(traceback.format_exception(outcome))
                    keep(self.kept, kind_of(outcome), given, self.seed, number, text)
                elif grew:
                    self.told[_OTHER] += 1
                    text = f"{growth >> 20} MiB more"
                    keep(self.kept, "memory", given, self.seed, number, text)
                else:
                    self.told[_READ if outcome else _REFUSED] += 1
        self.told[_CURRENT] = self.numbers.stop

    def ended(self) -> bool:
        """Whether all inputs were read; starts another process after one that was lost."""
        began = self.told[_BEGAN]
        hangs = self.process.is_alive() and time.monotonic() - began > SECONDS
        if self.process.is_alive() and not hangs:
            return False
        self.process.kill()
        self.process.join()
        current = int(self.told[_CURRENT])
        if current == self.numbers.stop:
            return True
        if hangs and current != self.slow:
            self.slow = current
            self.numbers = range(current, self.numbers.stop)
            self.start()
            return False
        # Where making it is what fails, the error comes here again.
        given = make_input(self.target, self.seed, current)
        kind = "hang" if hangs else f"end-of-process-{-self.process.exitcode}"
        keep(self.kept, kind, given, self.seed, current, kind)
        self.told[_OTHER] += 1
        self.told[_SLOWEST] = max(self.told[_SLOWEST], time.monotonic() - began if hangs else 0)
        self.numbers = range(current + 1, self.numbers.stop)
        self.start()
        return False


def _jobs(
    targets: Sequence[Target], number: int, seed: int, scratch: Path, out: Path
) -> Iterator[_Job]:
    """``number`` inputs in all, those of the targets by their shares."""
    whole = sum(target.share for target in targets)
    for target in targets:
        count = -int(-number * target.share // whole)
        for start in range(0, count, JOB):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            numbers = range(start, min(start + JOB, count))
            yield _Job(target, seed, numbers, folder, out / target.name)


def run(
    targets: Sequence[Target], number: int, seed: int, out: Path, processes: int
) -> list[Result]:
    """Attack the targets with ``number`` inputs in all, in several ``processes`` at once."""
    results = {target.name: Result(target.name) for target in targets}
    for target in targets:
        target.prepare()
    # What is freed in a forked process, or was before and is kept to be taken again, would hide as
    # much that it takes.
    gc.collect()
    with contextlib.suppress(AttributeError):  # not of every C library
        ctypes.CDLL(None).malloc_trim(0)
    with tempfile.TemporaryDirectory() as temporary:
        waiting = _jobs(targets, number, seed, Path(temporary), out)
        at_work: list[_Job] = []
        try:
            while True:
                while len(at_work) < processes and (job := next(waiting, None)) is not None:
                    job.start()
                    at_work.append(job)
                if not at_work:
                    break
                time.sleep(POLL)
                for job in [job for job in at_work if job.ended()]:
                    at_work.remove(job)
                    _add(results[job.target.name], job.told)
        finally:
            for job in at_work:
                job.process.kill()
    return list(results.values())


def _add(result: Result, told: SynchronizedArray) -> None:
    result.refused += int(told[_REFUSED])
    result.read += int(told[_READ])
    result.failures += int(told[_OTHER])
    result.slowest = max(result.slowest, told[_SLOWEST])
    result.growth = max(result.growth, int(told[_GROWTH]))


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser("torture fuzz", __doc__)
    parser.add_argument(
        "--number", type=command.positive, default=10000, help="inputs in all (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--target", nargs="+", metavar="NAME", help="default: all of them")
    parser.add_argument("--processes", type=command.positive, default=os.cpu_count())
    parser.add_argument("--out", default="output/fuzz", help="folder of failing inputs")
    parser.add_argument("--list", action="store_true", help="name the targets, and end")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    targets = all_targets()
    if arguments.list:
        print("\n".join(targets))
        return 0
    names = arguments.target or list(targets)
    for name in names:
        if name not in targets:
            hint = did_you_mean(name, targets, otherwise="--list names them")
            raise UserError(f"unknown target {name!r}; {hint}")
    found = [targets[name] for name in names]
    out = Path(arguments.out).resolve()
    began = time.monotonic()
    results = run(found, arguments.number, arguments.seed, out, arguments.processes)
    print(HEADER)
    for result in results:
        print(result.row(), flush=True)
    failures = sum(result.failures for result in results)
    inputs = sum(result.inputs for result in results)
    print(f"\n{inputs} inputs, {failures} failures, {time.monotonic() - began:.0f} s")
    if failures:
        print(f"each kind with an input: {out}")
    return int(bool(failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
