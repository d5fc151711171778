"""Search for good options: many runs, each a real training, the hopeless ones stopped early.

    python -m tools.tune --space space.yaml --trials 30 --config configs/quickstart.yaml

The space names options and what to try for each:

    lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    drop_path: {low: 0.0, high: 0.3, step: 0.1}
    opt: {choices: [adamw, lion]}

The study is kept in study.db (SQLite) of the output directory: the same command goes on with it
after a stop, and, started several times or on several machines that share the folder, works on it
together. best.yaml is a recipe for main.py --config.
"""

import argparse
import contextlib
import difflib
import fcntl
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import config as options
from config import Config
from errors import DivergedError, OptionError, UserError
from lock import LOCK_FILE, RunLock
from tools import command, recipe

MAIN = Path(__file__).resolve().parent.parent / "main.py"
POLL = 0.2  # seconds between looks at the logs
PATIENCE = 120.0  # seconds in which a training must end after SIGTERM
MOST_FAILURES = 3  # in a row, after which something else is wrong than the options
STUDY = "tune"


# --- the space ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """An option, and the values to try: ``choices``, or from ``low`` to ``high``."""

    option: options.Option
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def keys(self) -> list[str]:
        """The choices as text, for Optuna takes no lists."""
        return [json.dumps(choice) for choice in self.choices]

    def draw(self, trial: Any) -> Any:
        """The value of an Optuna trial."""
        if self.choices:
            return json.loads(trial.suggest_categorical(self.name, self.keys))
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(
                self.name, int(self.low), int(self.high), step=step, log=self.log
            )
        value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return float(f"{value:.6g}")  # for who reads the recipe

    @property
    def whole(self) -> bool:
        """Whether the option takes whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> list[Any]:
        """All values, as Optuna stores them. Raises UserError where there is no end of them."""
        if self.choices:
            return self.keys
        if self.step is None and not self.whole:
            raise UserError(f"{self.name}: --sampler grid needs choices, or a step")
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + i * step for i in range(count)]


def read_space(path: Path) -> list[Axis]:
    """The axes of a YAML file. Raises UserError for what is no option, or no value of it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--space: {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--space: {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--space: {path}: expected 'option: {{low: …, high: …}}' lines")
    try:
        axes = [_axis(str(name), values) for name, values in content.items()]
    except UserError as error:
        raise UserError(f"--space: {path}: {error}") from None
    if len({axis.name for axis in axes}) < len(axes):
        raise UserError(f"--space: {path}: an option is there twice")
    return axes


def _axis(name: str, values: Any) -> Axis:
    if not options.is_option(name):
        known = [opt.name for opt in options.options()]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; docs/options.md lists them"
        raise UserError(f"unknown option {name!r}{hint}")
    opt = options.by_name(name)
    if opt.transient or opt.name in ("plugin", "device"):
        raise UserError(f"{opt.name} is no part of a recipe and can't be searched")
    if not isinstance(values, dict):
        values = {"choices": values}
    wrong = set(values) - {"choices", "low", "high", "step", "log"}
    if wrong or ("choices" in values) == bool({"low", "high"} & set(values)):
        raise UserError(
            f"{opt.name}: expected choices: […], or low and high (with step, or log: true)"
        )
    if "choices" in values:
        return _choices(opt, values)
    return _range(opt, values)


def _choices(opt: options.Option, values: Mapping[str, Any]) -> Axis:
    choices = values["choices"]
    if len(values) > 1 or not isinstance(choices, list) or not choices:
        raise UserError(f"{opt.name}: choices must be a list, with nothing beside it")
    converted = [options.convert(opt, choice) for choice in choices]
    return Axis(opt, tuple(list(c) if isinstance(c, tuple) else c for c in converted))


def _range(opt: options.Option, values: Mapping[str, Any]) -> Axis:
    if not {"low", "high"} <= set(values):
        raise UserError(f"{opt.name}: a range needs low and high")
    low, high = (options.convert(opt, values[end]) for end in ("low", "high"))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high))
    if not numbers:
        raise UserError(f"{opt.name}: {opt.type_name} has no range: give choices")
    log, step = values.get("log", False), values.get("step")
    if not isinstance(log, bool):
        raise UserError(f"{opt.name}: log must be true or false")
    step = None if step is None else float(step)
    if not low < high or (step is not None and not 0 < step <= high - low):
        raise UserError(f"{opt.name}: low must be below high, and a step fit in between")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{opt.name}: log needs a low above 0, and takes no step")
    return Axis(opt, low=low, high=high, step=step, log=log)


# --- trials ---------------------------------------------------------------------------------------


@dataclass
class Running:
    """A trial whose training is under way."""

    trial: Any
    process: subprocess.Popen
    folder: Path
    owner: RunLock
    device: str
    read: int = 0  # bytes of log.txt
    values: list[float] = field(default_factory=list)
    pruned: bool = False


class Study:
    """An Optuna study whose trials are trainings in processes of their own."""

    def __init__(
        self,
        config: Config,
        axes: Sequence[Axis],
        folder: Path,
        *,
        pruner: Any,
        seed: int,
        grid: bool,
    ) -> None:
        optuna = command.require("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.states = optuna.trial.TrialState
        self.config = config
        self.axes = axes
        self.folder = folder
        self.seed = seed
        self.points = list(_points(axes)) if grid else None
        self.metric = config.save.best_metric
        self.lower = self.metric.endswith("loss")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError("output_dir", f"{folder}: {error.strerror}") from None
        with self._alone():
            self.study = optuna.create_study(
                study_name=STUDY,
                storage=optuna.storages.RDBStorage(
                    f"sqlite:///{folder / 'study.db'}",
                    # Others may be writing.
                    engine_kwargs={"connect_args": {"timeout": 60}},
                ),
                direction="minimize" if self.lower else "maximize",
                pruner=pruner,
                load_if_exists=True,
            )
            self._same_as_before()
            self.fail_stale()
            self._enqueue_grid()

    def _enqueue_grid(self) -> None:
        """Put the points of the grid in line that are neither done nor in it."""
        trials = self.study.get_trials(deepcopy=False)
        known = [
            t.params or t.system_attrs.get("fixed_params")
            for t in trials
            if t.state != self.states.FAIL
        ]
        for point in self.points or ():
            if point not in known:
                self.study.enqueue_trial(point)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process of this study is inside at the same time."""
        with open(self.folder / "study.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _same_as_before(self) -> None:
        """Refuse to go on with a study of another metric or space: its values tell nothing here."""
        space = {
            a.name: a.keys or [a.low, a.high, a.step, a.log] for a in sorted(self.axes, key=_name)
        }
        now = {"metric": self.metric, "space": json.dumps(space)}
        before = self.study.user_attrs
        for name, value in now.items():
            if before.get(name, value) != value:
                raise UserError(
                    f"{self.folder} holds a study of another {name}: choose another --output-dir"
                )
            self.study.set_user_attr(name, value)

    def fail_stale(self) -> int:
        """Mark trials whose process is gone as failed, end what they left; returns their number."""
        count = 0
        for frozen in self.study.get_trials(deepcopy=False, states=[self.states.RUNNING]):
            owner = self._owner_folder(frozen.number)
            try:
                owner.mkdir(parents=True, exist_ok=True)
                lock = RunLock(owner)
            except OptionError:
                continue  # another process is at it
            _end_orphan(self.trial_folder(frozen.number))
            self.study.tell(frozen.number, state=self.states.FAIL)
            lock.release()
            count += 1
            print(f"trial {frozen.number}: left by a process that is gone, marked as failed")
        return count

    def _sampler(self, number: int) -> Any:
        """What proposes trial ``number``; of two processes neither draws what the other does."""
        seed = (self.seed + 1_000_003 * number) % 2**32
        # Trials that run at the same time are told not to try the same.
        return self.optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _owner_folder(self, number: int) -> Path:
        return self.folder / ".owners" / f"{number:04d}"

    # --- one trial --------------------------------------------------------------------------------

    def start(self, most: int, device: str) -> Running | None:
        """Start the next trial; None if the study has, or is getting, ``most`` of them."""
        with self._alone():
            counted = (self.states.COMPLETE, self.states.PRUNED, self.states.RUNNING)
            if len(self.study.get_trials(deepcopy=False, states=counted)) >= most:
                return None
            waiting = self.study.get_trials(deepcopy=False, states=[self.states.WAITING])
            if self.points is not None and not waiting:
                return None
            self.study.sampler = self._sampler(len(self.study.get_trials(deepcopy=False)))
            trial = self.study.ask()
            values = {axis.name: axis.draw(trial) for axis in self.axes}
            folder = self._owner_folder(trial.number)
            folder.mkdir(parents=True, exist_ok=True)
            owner = RunLock(folder)
        folder = self.trial_folder(trial.number)
        folder.mkdir(exist_ok=True)
        shown = ", ".join(f"{k} {_short(v)}" for k, v in values.items())
        print(f"trial {trial.number}: {shown}", flush=True)
        text = options.to_yaml(self.config.replace("tune", **values))
        (folder / "options.yaml").write_text(text, encoding="utf-8")
        argv = [sys.executable, str(MAIN), "--config", str(folder / "options.yaml")]
        argv += ["--output-dir", str(folder)]
        if device:
            argv += ["--device", device]
        # A job of several tasks runs several searches; to a training it would look like its peers.
        peers = ("RANK", "WORLD_SIZE", "SLURM_NTASKS")
        environment = {k: v for k, v in os.environ.items() if k not in peers}
        with open(folder / "output.txt", "wb") as output:
            # Its own group: Ctrl-C in the terminal is passed on by this process, once.
            process = subprocess.Popen(
                argv,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        return Running(trial, process, folder, owner, device)

    def follow(self, running: Running) -> None:
        """Pass on the epochs that were logged since; end the training if it is to be pruned."""
        for record in _new_records(running):
            value = record.get(self.metric)
            if value is None:
                continue
            running.values.append(value)
            running.trial.report(value, step=record["epoch"] + 1)
            epochs = self.config.run.epochs + self.config.schedule.cooldown_epochs
            over = record["epoch"] + 1 >= epochs
            if not (over or running.pruned) and running.trial.should_prune():
                running.pruned = True
                running.process.terminate()

    def finish(self, running: Running) -> bool:
        """Enter the result of a training that has ended; returns whether it counts."""
        self.follow(running)
        code, number = running.process.returncode, running.trial.number
        values = running.values
        best = (min if self.lower else max)(values) if values else None
        state, word = self.states.FAIL, f"failed with code {code}: {_last_line(running.folder)}"
        if code == 0 and best is not None:
            # Also where the signal came too late.
            state, word = self.states.COMPLETE, "done"
        elif running.pruned:
            state, word = self.states.PRUNED, f"pruned after {len(values)} epochs"
        elif code == DivergedError.exit_code:
            # For the sampler: as bad as can be, not unknown.
            state, word = self.states.PRUNED, "diverged"
        running.trial.set_user_attr("end", word)
        complete = state == self.states.COMPLETE
        self.study.tell(running.trial, best if complete else None, state=state)
        running.owner.release()
        _remove_checkpoints(running.folder, best_too=not complete)
        score = "" if best is None else f", {self.metric} {best:.4g}"
        print(f"trial {number}: {word}{score}", flush=True)
        return state != self.states.FAIL

    def give_up(self, running: Sequence[Running]) -> None:
        """End trainings because the search was stopped; they count as failed."""
        for one in running:
            one.process.terminate()
        for one in running:
            _wait(one.process)
            one.trial.set_user_attr("end", "the search was stopped")
            self.study.tell(one.trial, state=self.states.FAIL)
            one.owner.release()

    # --- results ----------------------------------------------------------------------------------

    def completed(self) -> list[Any]:
        """Trials with a result, the best one first."""
        done = self.study.get_trials(deepcopy=False, states=[self.states.COMPLETE])
        return sorted(done, key=lambda t: t.value, reverse=not self.lower)

    def values_of(self, frozen: Any) -> dict[str, Any]:
        """The options of a trial."""
        fixed = self.optuna.trial.FixedTrial(frozen.params)
        return {axis.name: axis.draw(fixed) for axis in self.axes}

    def write_results(self) -> None:
        """``best.yaml`` and the plots, of all trials so far."""
        done = self.completed()
        if not done:
            return
        best = done[0]
        note = (
            f"Written by tools.tune: trial {best.number} of {len(self.study.trials)}, "
            f"{self.metric} {best.value:.4g}."
        )
        with self._alone():
            recipe.write(self.folder / "best.yaml", self.config, self.values_of(best), note)
            plot_history(self.folder / "history.png", self)
            plot_importance(self.folder / "importance.png", self)


def _name(axis: Axis) -> str:
    return axis.name


def _points(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid, the last axis changing first."""
    for values in itertools.product(*(axis.grid() for axis in axes)):
        yield {axis.name: value for axis, value in zip(axes, values, strict=True)}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _new_records(running: Running) -> list[dict[str, Any]]:
    """Whole lines of log.txt that have come since the last look."""
    try:
        with open(running.folder / "log.txt", "rb") as file:
            file.seek(running.read)
            content = file.read()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    running.read += len(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _last_line(folder: Path) -> str:
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"see {folder / 'output.txt'}")


def _remove_checkpoints(folder: Path, *, best_too: bool) -> None:
    """A search makes more of them than a disk may hold, and nobody goes on with its trials."""
    for path in [*folder.glob("checkpoint-*.pth"), *(folder.glob("best.pth") if best_too else ())]:
        path.unlink()


def _wait(process: subprocess.Popen) -> None:
    """Wait for a training that was told to end."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_orphan(folder: Path) -> None:
    """End the training that a killed search has left in ``folder``, if it is on this machine."""
    if not folder.is_dir():
        return
    try:
        RunLock(folder).release()
    except OptionError:
        holder = json.loads((folder / LOCK_FILE).read_text())
        if holder["host"] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGTERM)


# --- the search -----------------------------------------------------------------------------------


class Interrupt:
    """Takes note of SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def search(study: Study, most: int, jobs: int, devices: Sequence[str]) -> int:
    """Run trials, ``jobs`` at a time, until the study has ``most``; returns the exit code."""
    slots = list(itertools.islice(itertools.cycle(devices or [""]), jobs))
    running: list[Running] = []
    failures = 0
    with Interrupt() as stop:
        while not stop.signal:
            while slots and failures < MOST_FAILURES:
                started = study.start(most, slots[0])
                if started is None:
                    break
                slots.pop(0)
                running.append(started)
            if not running:
                break
            time.sleep(POLL)
            for one in list(running):
                if one.process.poll() is None:
                    study.follow(one)
                    continue
                running.remove(one)
                slots.append(one.device)
                failures = 0 if study.finish(one) else failures + 1
                study.write_results()
        if stop.signal:
            study.give_up(running)
            print("stopped; the same command goes on with the study")
            return 128 + stop.signal
    if failures >= MOST_FAILURES:
        raise UserError(
            f"{failures} trials in a row failed, the last as {study.folder}/trial-*/output.txt says"
        )
    return 0


# --- plots ----------------------------------------------------------------------------------------


def plot_history(path: Path, study: Study) -> None:
    """Draw each trial's result, and the best so far."""
    figure = command.require("matplotlib.figure", "matplotlib").Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    done = sorted(study.completed(), key=lambda t: t.number)
    numbers, values = [t.number for t in done], [t.value for t in done]
    better = min if study.lower else max
    best = list(itertools.accumulate(values, better))
    axes.plot(numbers, values, "o", color="tab:blue", label="done")
    axes.step(numbers, best, where="post", color="tab:orange", label="best so far")
    pruned = [t for t in study.study.trials if t.state == study.states.PRUNED]
    pruned = [t for t in pruned if t.intermediate_values]
    if pruned:
        last = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
        axes.plot(
            [t.number for t in pruned], last, "x", color="tab:gray", label="pruned, last value"
        )
    axes.set(xlabel="trial", ylabel=study.metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_importance(path: Path, study: Study) -> None:
    """Draw what matters for a good result (PED-ANOVA, Watanabe et al. 2023).

    Nothing is drawn while there are too few trials to tell.
    """
    evaluator = study.optuna.importance.PedAnovaImportanceEvaluator
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", study.optuna.exceptions.ExperimentalWarning)
            shares = study.optuna.importance.get_param_importances(
                study.study, evaluator=evaluator()
            )
    except (UserWarning, ValueError, RuntimeError):
        return
    figure_module = command.require("matplotlib.figure", "matplotlib")
    figure = figure_module.Figure(figsize=(8, 0.4 * len(shares) + 1.2))
    axes = figure.add_subplot()
    bars = axes.barh(list(shares), list(shares.values()), color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=f"importance for a good {study.metric}", xlim=(0, 1.1))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
    temporary.replace(path)


# --- the command ----------------------------------------------------------------------------------


def _pruner(optuna: Any, arguments: argparse.Namespace, epochs: int) -> Any:
    if arguments.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=arguments.prune_after)
    if arguments.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    return optuna.pruners.NopPruner()


def _check_corners(config: Config, axes: Sequence[Axis]) -> None:
    """Raise UserError where one end of an axis is impossible beside the other options."""
    for axis in axes:
        for value in axis.choices or (axis.low, axis.high):
            config.replace("tune", **{axis.name: value})


def tune(arguments: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    optuna = command.require("optuna")
    config: Config = arguments.config
    if arguments.trials < 1 or arguments.jobs < 1:
        raise UserError("--trials and --jobs: at least 1")
    axes = read_space(arguments.space)
    _check_corners(config, axes)
    name = f"tune-{config.model.model}-{config.data.data_set}".replace("/", "-")
    folder = Path(config.run.output_dir or Path("output") / name).expanduser()
    study = Study(
        config,
        axes,
        folder,
        pruner=_pruner(optuna, arguments, config.run.epochs),
        seed=arguments.study_seed,
        grid=arguments.sampler == "grid",
    )
    code = search(study, arguments.trials, arguments.jobs, arguments.devices)
    done = study.completed()
    if not done:
        print("no trial has come to its end")
        return code or 1
    print(f"best: trial {done[0].number}, {study.metric} {done[0].value:.4g}")
    for name, value in study.values_of(done[0]).items():
        print(f"  {name}: {_short(value)}")
    plots = [str(folder / f"{name}.png") for name in ("history", "importance")]
    print("plots:", ", ".join(path for path in plots if Path(path).exists()))
    print(f"next: python main.py --config {folder / 'best.yaml'}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.run_parser("tune", __doc__)
    add = arguments.add_argument
    add("--space", type=Path, required=True, help="YAML file: what to try")
    add("--trials", type=int, default=30, help="of the study in all (default: 30)")
    add("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    add("--devices", nargs="+", default=(), metavar="DEVICE", help="of the jobs: cuda:0 cuda:1 …")
    add("--sampler", choices=("tpe", "grid"), default="tpe", help="(default: tpe)")
    add(
        "--pruner", choices=("median", "hyperband", "none"), default="median",
        help="what ends hopeless trials early (default: median)",
    )  # fmt: skip
    add(
        "--prune-after", type=int, default=5, metavar="N",
        help="median: trials before the first is pruned (default: 5)",
    )  # fmt: skip
    add("--study-seed", type=int, default=0, help="of the sampler (default: 0)")
    return command.run(tune, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
