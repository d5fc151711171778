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
from dataclasses import dataclass, field
from pathlib import Path

import training.run
from tools.common import command
from tools.torture.kills import make_images
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


@dataclass(frozen=True)
class Case:
    """What one rank has that the others haven't, and the line that must follow.

    In ``said``, ODD stands for the number of that rank.
    """

    name: str
    said: str
    options: tuple[str, ...] = ()
    """Of the odd rank alone."""
    shared: tuple[str, ...] = ()
    """Of all."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the odd rank alone."""
    images: Callable[[Path], None] | None = None
    """Changes the odd rank's copy of the images."""
    codes: tuple[int, ...] = (2,)


def _rename_class(images: Path) -> None:
    for part in ("train", "val"):
        (images / part / "class1").rename(images / part / "class1b")


def _lose_file(images: Path) -> None:
    (images / "train" / "class1" / "3.png").unlink()


def _rename_file(images: Path) -> None:
    (images / "val" / "class1" / "1.png").rename(images / "val" / "class1" / "7.png")


def _move_label(images: Path) -> None:
    (images / "train" / "class1" / "3.png").rename(images / "train" / "class2" / "x.png")
    (images / "train" / "class2" / "5.png").rename(images / "train" / "class1" / "y.png")


def _other_content(images: Path) -> None:
    file = images / "train" / "class0" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")


def _lose_all(images: Path) -> None:
    shutil.rmtree(images)


def _nothing(images: Path) -> None:
    """Another folder of the same images."""


def _option(flag: str, other: str, said: str, usual: str, *shared: str) -> Case:
    options = (flag, other) if other else (flag,)
    said = rf"rank ODD \(host .*\) has {said}, ranks? [\d, ]+\(host .*\) ha(s|ve) {usual}"
    return Case(" ".join((*shared, *options)), said, options, shared)


DISAGREEMENTS = (
    _option("--lr", "0.02", "--lr 0.02", "--lr 0.01"),
    _option("--seed", "4", "--seed 4", "--seed 3"),
    _option("--opt", "sgd", "--opt sgd", "--opt adamw"),
    _option("--amp", "bf16", "--amp bfloat16", "--amp off"),
    _option("--batch-size", "3", "--batch-size 3", "--batch-size 2"),
    _option("--epochs", "3", "--epochs 3", "--epochs 2"),
    _option("--model", "modern_lenet", "--model modern_lenet", "--model deit_nano"),
    _option("--no-model-ema", "", "--model-ema False", "--model-ema True"),
    _option("--accum-steps", "2", "--accum-steps 2", "--accum-steps 1"),
    _option("--resume", "auto", "--resume auto", "--resume none"),
    _option("--eval", "", "--eval True", "--eval False", "--resume", "auto"),
    _option("--fsdp", "", "--fsdp True", "--fsdp False"),
    _option("--plugin", "PLUGIN", r"--plugin other.py \(content .*\)", "--plugin none"),
    _option("--no-dist-eval", "", "--dist-eval False", "--dist-eval True"),
    Case(
        "class folders",
        r"rank ODD .*has class 1 'class1b', ranks? [\d, ]+\(.*ha(s|ve) class 1 'class1'",
        images=_rename_class,
    ),
    Case("one file fewer", r"rank ODD .*has 23 training images.*class1/3\.png", images=_lose_file),
    Case("validation file", r"the first validation image .*rank ODD .*7\.png", images=_rename_file),
    Case("labels moved", r"first training image .*rank ODD .*of class", images=_move_label),
    Case("content of a file", r"rank ODD .*class0/0\.png of \d+ bytes", images=_other_content),
    Case(
        "no data",
        "error: (process ODD failed: )?--data-path: .* does not exist",
        images=_lose_all,
    ),
    Case(
        "other files in an evaluation",
        r"the first validation image .*rank ODD",
        shared=("--eval", "--finetune", "WEIGHTS"),
        images=_rename_file,
    ),
    Case(
        "starting weights",
        r"start from other weights: rank ODD .*layer",
        ("--finetune", "OTHER_WEIGHTS"),
        ("--finetune", "WEIGHTS"),
    ),
    Case(
        "WORLD_SIZE",
        r"is one of \d processes|number 2 did not come|can't meet",
        environment={"WORLD_SIZE": "4"},
    ),
    Case("another root, the same images", "", images=_nothing, codes=(0,)),
)
ENVIRONMENTS = tuple(
    Case(f"{name}={value!r}", rf"--\S+: .*{name}", environment={name: value}, codes=(2, 1))
    for name, value in (
        *(("LOCAL_RANK", "x"), ("LOCAL_RANK", "9"), ("RANK", ""), ("RANK", "-1"), ("RANK", "7")),
        *(("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("LOCAL_WORLD_SIZE", "0")),
        *(("MASTER_PORT", "99999"), ("MASTER_PORT", "0"), ("MASTER_PORT", "abc")),
        *(("MASTER_ADDR", ""), ("TORCHELASTIC_MAX_RESTARTS", "many")),
    )
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
        self.plugin = folder / "other.py"
        self.plugin.write_text("x = 1\n")
        self.weights = [self._weights(seed) for seed in (0, 1)]
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
        names = {
            "PLUGIN": self.plugin,
            "WEIGHTS": self.weights[0],
            "OTHER_WEIGHTS": self.weights[1],
        }
        return [str(names.get(option, option)) for option in options]

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
    images = folder / "images"
    shutil.copytree(ground.images, images)
    if case.images is not None:
        case.images(images)

    def options(rank: int) -> list[str]:
        data = images if rank == odd else ground.images
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
