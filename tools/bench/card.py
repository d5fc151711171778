"""What needs a CUDA card, in one go: the tests, then the benchmarks.

Each part is a process of its own with a time limit of its own, and one that fails or hangs doesn't
stop the next. What matters most comes first; the tests share the machine with runs that fill the
compiler's cache, each benchmark has it alone. FOLDER gets the figures as they are measured, the
output of the parts, and after each part a summary of all.
"""

import argparse
import contextlib
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tools.bench.card_summary import Done, write_summary
from tools.common import command

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 10.0  # seconds between the request to end and the end
LEAST = 8.0  # seconds: with less left a part isn't begun
PATIENCE = 20  # times the limits, with --dry: any machine will do
TEST_FILES = (
    ("tests-runs", ("tests/test_cuda.py", "tests/test_cuda_kinds.py"), 6),
    (
        "tests-kernels",
        (
            "tests/architectures/test_talking_heads.py",
            "tests/architectures/test_talking_heads_triton.py",
            "tests/test_engine.py",
            "tests/optimization/test_optimizer.py",
        ),
        2,
    ),
)


@dataclass(frozen=True)
class Part:
    """A command of this project."""

    name: str
    limit: float
    """Seconds."""
    line: tuple[str, ...]
    """What follows ``python``."""
    toy: tuple[str, ...] = ("--toy",)
    """What makes it short with --dry."""
    told: bool = True
    """Whether it takes --seconds-left."""


@dataclass
class Running:
    """A part that was started."""

    part: Part
    pid: int
    start: float
    """time.monotonic() when it was."""
    limit: float
    """Seconds that it has."""
    asked: bool = field(default=False)
    """Whether it was asked to end."""

    def overdue(self) -> float:
        """Seconds past its limit; negative before."""
        return time.monotonic() - self.start - self.limit


def bench(name: str, limit: float, out: Path, *options: str, benchmark: str = "") -> Part:
    """A benchmark that writes into ``out``; ``benchmark`` where ``name`` isn't its name."""
    line = ("-m", "tools.bench", benchmark or name, *options, "--out", str(out))
    return Part(name, limit, line)


def tests(name: str, files: Sequence[str], workers: int) -> Part:
    """Tests on several processes; a hanging one shows where in its output."""
    line = ["-m", "pytest", "-v", "--tb=short", "-rfE", "--durations=8", "-p", "no:cacheprovider"]
    # The machine's own pytest may know fewer options, or have no pytest-xdist.
    line += ["-o", "faulthandler_timeout=100", "-o", "addopts=", "--import-mode=importlib"]
    several = ("-n", str(workers), "--dist=worksteal") if find_spec("xdist") else ()
    one = ("-n", "0") if several else ()
    return Part(name, 150, (*line, *several, *files), toy=("--collect-only", *one), told=False)


def waves(out: Path, scratch: Path) -> list[list[Part]]:
    """All parts: those of an inner list run at the same time."""
    warm = {"benchmark": "step"}
    small = ("deit_small_patch16_224", "deit_base_patch16_224")
    other = ("resnet50", "deit_tiny_patch16_224")
    several = len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1
    return [
        [
            *(tests(*row) for row in TEST_FILES),
            bench("warm-small", 150, scratch, "--repeats", "1", "--models", *small, **warm),
            bench("warm-other", 150, scratch, "--repeats", "1", "--models", *other, **warm),
            bench("warm-cait", 150, scratch, "--repeats", "1", benchmark="attention"),
        ],
        [bench("step", 170, out, "--repeats", "5")],
        [bench("attention", 90, out)],
        [bench("epoch", 60, out, "--repeats", "5")],
        [bench("cache", 60, out, "--repeats", "5")],
        [bench("loader", 60, out, "--repeats", "5")],
        [bench("variants", 100, out, "--repeats", "3", "--variants", benchmark="step")],
        [bench("serve", 60, out, "--device", "auto", "--seconds", "3", "--long", "5")],
        [bench("scaling", 100, out, "--repeats", "3")] if several else [],
    ]


class Runner:
    """Starts parts, ends those whose time is over, and keeps the summary.

    Args:
        out: folder of the results.
        seconds: for all parts together.
        dry: make each part short.
    """

    def __init__(self, out: Path, seconds: float, *, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.patience = PATIENCE if dry else 1
        self.start = time.monotonic()
        self.end = self.start + self.patience * seconds
        self.done: list[Done] = []
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds left for all."""
        return self.end - time.monotonic()

    def run(self, parts: Sequence[Part]) -> None:
        """Run ``parts`` at the same time, each until it ends or its time is over."""
        running = []
        for part in parts:
            limit = min(self.patience * part.limit, self.left() - GRACE)
            if limit < LEAST:
                self._note(Done(part.name, None, 0.0, "no time was left"))
            else:
                running.append(Running(part, self._start(part, limit), time.monotonic(), limit))
        try:
            while running:
                running = [one for one in running if not self._ended(one)]
                time.sleep(0.05)
        finally:
            for one in running:
                _signal(one.pid, signal.SIGKILL)

    def _start(self, part: Part, limit: float) -> int:
        line = [*part.line, *(part.toy if self.dry else ())]
        if part.told:
            line += ["--seconds-left", f"{limit - 5:.0f}"]
        pid = os.fork()
        if pid == 0:
            _become(line, self.log(part.name), imported=self.dry)
        return pid

    def log(self, name: str) -> Path:
        """The file of a part's output."""
        return self.out / "logs" / f"{name}.txt"

    def _ended(self, one: Running) -> bool:
        """Whether a part has ended; one whose time is over is asked to, then killed."""
        pid, status = os.waitpid(one.pid, os.WNOHANG)
        if not pid:
            if one.overdue() > GRACE:
                _signal(one.pid, signal.SIGKILL)
            elif one.overdue() > 0 and not one.asked:
                one.asked = True
                _signal(one.pid, signal.SIGINT)
            return False
        _signal(one.pid, signal.SIGKILL)  # what it has left behind
        seconds = time.monotonic() - one.start
        why = f"cut off after {one.limit:.0f} s" if one.asked else ""
        self._note(Done(one.part.name, os.waitstatus_to_exitcode(status), seconds, why))
        return True

    def _note(self, done: Done) -> None:
        self.done.append(done)
        print(f"== {done.text()} (at {time.monotonic() - self.start:.0f} s)", flush=True)
        try:
            write_summary(self.out, self.done)
        except Exception:  # of any kind: the next parts are to be run
            traceback.print_exc()


def _become(line: Sequence[str], log: Path, *, imported: bool) -> None:
    """In a forked process: become ``python line``, its output in ``log``; never returns.

    With ``imported`` it stays this interpreter, which spares it what that has imported already.
    """
    code = 70
    try:
        os.setsid()
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if not imported:
            os.execv(sys.executable, [sys.executable, *line])
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.argv = list(line[1:])  # after -m
        runpy.run_module(line[1], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _signal(pid: int, number: int) -> None:
    """Send a signal to a part and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _chosen(parts: list[list[Part]], names: Sequence[str] | None) -> list[list[Part]]:
    return [[p for p in wave if names is None or p.name in names] for wave in parts]


def _carry_out(arguments: argparse.Namespace) -> int:
    out = arguments.folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        parts = _chosen(waves(out, Path(scratch)), arguments.parts)
        if arguments.list:
            for part in (part for wave in parts for part in wave):
                print(f"{part.name} ({part.limit:.0f} s): python {' '.join(part.line)}")
            return 0
        for old in out.glob("*.json") if arguments.parts is None else ():
            old.unlink()  # a target reached in an earlier run says nothing of this one
        runner = Runner(out, arguments.seconds, dry=arguments.dry)
        for wave in parts:
            runner.run(wave)
    print((out / "summary.txt").read_text(encoding="utf-8"))
    return int(any(done.code for done in runner.done))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a part failed."""
    parser = command.parser("bench card", __doc__)
    default = Path("output/gpu")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=default, help="for results (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=480, help="for all together (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", help="these alone (--list names them)")
    parser.add_argument("--list", action="store_true", help="show the parts, run nothing")
    parser.add_argument(
        "--dry", action="store_true", help="see on any machine, at toy size, that all parts run"
    )
    return command.run(_carry_out, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
