"""Processes that disagree, freeze or are told nonsense: who is named, and after how many seconds.

    python -m tools.torture ranks

Real process groups are started. In each case one rank, the last, has something else than the
others, or a process is stopped with SIGSTOP. All that can run must end, with an error code and a
line that names the right rank and thing. At the end of a case nothing of it runs any more.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import training.run
from tools.common import command
from tools.torture.disagreements import DISAGREEMENTS, ENVIRONMENTS, FILES, LIST, Case
from tools.torture.kills import make_bands, make_images
from tools.torture.processes import free_port, kill, start, wait

PRELOADED = training.run  # imported here, so that not each process has to
LIMIT = 5.0  # seconds for a disagreement
TIMEOUT = 4  # --dist-timeout of what freezes
AFTER = 6.0  # seconds beyond it
PATIENCE = 90.0
OPTIONS = (
    *("--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu", "--epochs", "2"),
    *("--warmup-epochs", "1", "--lr", "0.01", "--batch-size", "2", "--num-workers", "0"),
    *("--no-tensorboard", "--seed", "3"),
)


HANG = "its main thread hangs"


@dataclass(frozen=True)
class Freeze:
    """A process that is stopped with SIGSTOP."""

    rank: int | None
    """None: all, and woken again after twice the timeout."""
    moment: str


FREEZES = tuple(
    Freeze(rank, moment)
    for moment in ("start", "meeting", "training", "evaluation", HANG)
    for rank in (0, 1)
) + (Freeze(None, "training"),)
# Plug-ins that hold each process once it has met the others, in an evaluation, or one for ever.
_SLOW = {
    "meeting": "import time\ntime.sleep(3)\n",
    "evaluation": """
import pathlib, time, engine
evaluate = engine.evaluate
def slow(*args, **named):
    pathlib.Path(__file__).with_name("evaluates").touch()
    time.sleep(2)
    return evaluate(*args, **named)
engine.evaluate = slow
""",
    HANG: """
import os, time, engine
evaluate = engine.evaluate
def never(*args, **named):
    while os.environ["RANK"] == os.environ["HANGS"]:
        time.sleep(0.1)
    return evaluate(*args, **named)
engine.evaluate = never
""",
}
_LONG = ("--epochs", "100000", "--dist-timeout", str(TIMEOUT), "--dist-start-timeout", str(TIMEOUT))


@dataclass
class Outcome:
    """What came of one case."""

    name: str
    world: int
    seconds: float
    faults: list[str]

    def row(self) -> str:
        cells = (self.name, self.world, f"{self.seconds:.1f}", "; ".join(self.faults) or "ok")
        return f"| {' | '.join(map(str, cells))} |"


HEADER = "| case | processes | seconds | |\n|---|---|---|---|"


class Ground:
    """A folder with what the cases use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        make_images(self.images)
        make_bands(folder / "bands")
        self.names = {"PLUGIN": str(folder / "other.py")}
        (folder / "other.py").write_text("x = 1\n")
        for prefix, turn in (("", 0), ("OTHER_", 1)):
            self.names[f"{prefix}WEIGHTS"] = str(self._weights(turn))
            for kind, (name, contents) in FILES.items():
                file = folder / f"files{turn}" / name
                file.parent.mkdir(exist_ok=True)
                file.write_text(contents[turn])
                self.names[prefix + kind] = str(file)
        self._count = 0

    def _weights(self, seed: int) -> Path:
        """The best weights of a run of its own."""
        run = self.folder / f"weights{seed}"
        argv = [*OPTIONS, "--data-path", str(self.images), "--output-dir", str(run)]
        argv += ["--epochs", "1", "--warmup-epochs", "0", "--seed", str(seed)]
        if wait(start(argv, 1, self.folder / "weights.txt"), time.monotonic() + PATIENCE) != [0]:
            raise SystemExit(f"a plain run failed, see {self.folder / 'weights.txt'}")
        return run / "best.pth"

    def new(self) -> Path:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder

    def filled(self, options: Sequence[str]) -> list[str]:
        return [self.names.get(option, option) for option in options]

    def start(
        self,
        folder: Path,
        world: int,
        options: Callable[[int], Sequence[str]],
        environment: Callable[[int], Mapping[str, str]] = lambda rank: {},
    ) -> list[int]:
        """Start ``world`` processes; each writes to a log of its own."""
        port = str(free_port())
        pids = []
        for rank in range(world):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            variables |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            variables |= {"MASTER_PORT": port, **environment(rank)}
            argv = [*OPTIONS, "--output-dir", str(folder / "run"), *self.filled(options(rank))]
            pids += start(argv, 1, folder / f"{rank}.txt", variables)
        return pids


def _ended(pids: Sequence[int], limit: float) -> tuple[list[int] | None, float]:
    """Exit codes and the seconds until all have ended; None where some still run."""
    began = time.monotonic()
    codes = wait(pids, began + limit)
    return codes, time.monotonic() - began


def disagree(ground: Ground, case: Case, world: int) -> Outcome:
    """Start a case and see how it ends."""
    folder, odd = ground.new(), world - 1
    usual, own = ground.folder / case.data, folder / case.data
    shutil.copytree(usual, own)
    if case.images is not None:
        case.images(own)

    def options(rank: int) -> list[str]:
        data = (own if rank == odd else usual) / (LIST if case.data == "bands" else "")
        mine = case.options if rank == odd else ()
        return ["--data-path", str(data), "--dist-start-timeout", "3", *case.shared, *mine]

    pids = ground.start(
        folder, world, options, lambda rank: case.environment if rank == odd else {}
    )
    codes, seconds = _ended(pids, PATIENCE)
    faults = []
    if codes is None:
        kill(pids)
        return Outcome(case.name, world, seconds, ["some still run"])
    for rank, code in enumerate(codes):
        text = (folder / f"{rank}.txt").read_text()
        # Who never meets the others can only tell that of itself.
        told = not case.environment or rank == odd
        if told and code not in case.codes:
            faults.append(f"exit code {code} of rank {rank}")
        if "Traceback" in text:
            faults.append(f"a traceback of rank {rank}")
        if told and not re.search(case.said.replace("ODD", str(odd)), text):
            faults.append(f"rank {rank} says {_last_line(text)!r}")
    return Outcome(case.name, world, seconds, faults)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def freeze(ground: Ground, case: Freeze, world: int) -> Outcome:
    """Stop a process of a run and see how the others end."""
    folder = ground.new()
    options = ["--data-path", str(ground.images), *_LONG]
    if case.moment in _SLOW:
        plugin = folder / "slow.py"
        plugin.write_text(_SLOW[case.moment])
        options += ["--plugin", str(plugin)]
    pids = ground.start(folder, world, lambda rank: options, lambda rank: {"HANGS": str(case.rank)})
    frozen = pids if case.rank is None else [pids[case.rank]]
    marks = {"training": "run/checkpoint-*", "evaluation": "evaluates"}
    if case.moment == "meeting":
        time.sleep(1.5)
    elif case.moment in marks:
        deadline = time.monotonic() + PATIENCE
        while not any(folder.glob(marks[case.moment])) and time.monotonic() < deadline:
            time.sleep(0.05)
    if case.moment == HANG:
        frozen = []
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    name = f"{'all are' if case.rank is None else f'rank {case.rank} is'} stopped, {case.moment}"
    if case.moment == HANG:
        name = f"rank {case.rank}: {case.moment}"
    if case.rank is None:
        return _woken(name, world, pids)
    others = [pid for pid in pids if pid not in frozen]
    codes, seconds = _ended(others, TIMEOUT + PATIENCE)
    heard = [rank for rank in range(world) if pids[rank] in others]
    texts = [(folder / f"{rank}.txt").read_text() for rank in heard]
    kill(frozen if codes is not None else pids)
    faults = []
    if codes is None:
        faults = ["some still run"]
    elif not all(codes):
        faults = [f"exit codes {codes}"]
    known = rf"process {case.rank} \(host .*, pid {pids[case.rank]}\) has given no sign of life for"
    said = {
        # It may have met the others by then.
        "start": rf"process(es)? .*(can't meet|number {case.rank} did not come)|{known}",
        HANG: rf"no process got on for .*process {case.rank} \(host .*\) is at training",
    }.get(case.moment, known)
    faults += [f"says {_last_line(text)!r}" for text in texts if not re.search(said, text)]
    faults += ["a traceback" for text in texts if "Traceback" in text]
    return Outcome(name, world, seconds, faults)


def _woken(name: str, world: int, pids: Sequence[int]) -> Outcome:
    """Wake all processes after twice the timeout: they must go on."""
    time.sleep(2 * TIMEOUT)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    codes, seconds = _ended(pids, 2.0 * TIMEOUT)
    if codes is None:
        kill(pids)
    faults = [] if codes is None else [f"ended with {codes}"]
    return Outcome(f"{name}, then woken: still there after", world, seconds, faults)


def meet_again(ground: Ground, world: int) -> list[Outcome]:
    """Meet at a file, twice at once, and again where a killed run has left it."""
    folder = ground.new()
    shared = ["--data-path", str(ground.images), "--dist-url", f"file://{folder}/meet"]
    long = [*shared, *_LONG]
    first = ground.start(folder, world, lambda rank: long)
    deadline = time.monotonic() + PATIENCE
    while not any(folder.glob("run/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    outcomes = []
    for name, fits in (("a second run at a file", False), ("at a file of a killed run", True)):
        again = folder / name.replace(" ", "-")
        again.mkdir()
        codes, seconds = _ended(pids := ground.start(again, world, lambda rank: shared), PATIENCE)
        faults = [] if codes == [0 if fits else 2] * world else [f"ended with {codes}"]
        if codes is None:
            kill(pids)
        said = "weights" if fits else "two processes at .* have RANK"
        texts = "".join((again / f"{rank}.txt").read_text() for rank in range(world))
        if not re.search(said, texts):
            faults.append(f"says {_last_line(texts)!r}")
        outcomes.append(Outcome(name, world, seconds, faults))
        if not fits:
            kill(first)
    return outcomes


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture ranks", __doc__)
    parser.add_argument(
        "--world", type=command.positive, nargs="+", default=[2, 3], help="processes (default: 2 3)"
    )
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    print(HEADER, flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        ground = Ground(Path(temporary))
        for world in arguments.world:
            cases = [(disagree, case, LIMIT) for case in (*DISAGREEMENTS, *ENVIRONMENTS)]
            cases += [
                (freeze, case, TIMEOUT + AFTER + (PATIENCE if case.moment == HANG else 0))
                for case in FREEZES
            ]
            for try_out, case, limit in cases:
                if arguments.only not in str(case):
                    continue
                outcome = try_out(ground, case, world)
                if outcome.seconds > limit and getattr(case, "codes", ()) != (0,):
                    outcome.faults.append(f"later than {limit:g} s")
                outcomes.append(outcome)
                print(outcome.row(), flush=True)
            if arguments.only in "file":
                outcomes += meet_again(ground, world)
                print("\n".join(outcome.row() for outcome in outcomes[-2:]), flush=True)
    bad = sum(bool(outcome.faults) for outcome in outcomes)
    print(f"\n{len(outcomes)} cases, {bad} not as promised")
    return int(bool(bad))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
