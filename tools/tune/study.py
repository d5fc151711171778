"""A study: Optuna's record of the trials, shared by all searches that work on its folder."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Config
from errors import DivergedError, OptionError, UserError, first_line, printable, shortened
from tools.common import command, recipe
from tools.tune.plots import plot_history, plot_importance
from tools.tune.processes import TrainingProcess, end_orphan
from tools.tune.space import Axis, grid_points
from training.lock import RunLock

STUDY = "tune"
"""The study's name in study.db."""


@dataclass
class RunningTrial:
    """A trial whose training is under way."""

    trial: Any
    """Optuna's."""
    training: TrainingProcess
    owner: RunLock
    """Held as long as this search is at the trial."""
    device: str
    values: list[float] = field(default_factory=list)
    """The metric of each epoch with a validation so far."""
    epoch: int = 0
    """Epochs that are done."""
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
        self.points = list(grid_points(axes)) if grid else None
        self.metric = config.save.best_metric
        self.lower_is_better = self.metric.endswith("loss")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError("output_dir", f"{folder}: {error.strerror}") from None
        with self._exclusive():
            self._begin(pruner)

    def _begin(self, pruner: Any) -> None:
        """Open the study and read it once. Raises UserError for a file that is none."""
        try:
            self.study = self._open(pruner)
            self._check_unchanged()
            self._fail_abandoned()
            self._enqueue_grid()
        except (UserError, OSError):
            raise
        except Exception as error:  # of SQLite, SQLAlchemy and Optuna, for a damaged file
            reason = printable(shortened(first_line(error)))
            raise UserError(
                f"{self.folder / 'study.db'} can't be read as a study ({reason}): choose another "
                "--output-dir, or move it away"
            ) from error

    def _open(self, pruner: Any) -> Any:
        """The study in study.db, which is made where there is none."""
        return self.optuna.create_study(
            study_name=STUDY,
            storage=self.optuna.storages.RDBStorage(
                f"sqlite:///{self.folder / 'study.db'}",
                # Others may be writing.
                engine_kwargs={"connect_args": {"timeout": 60}},
            ),
            direction="minimize" if self.lower_is_better else "maximize",
            pruner=pruner,
            load_if_exists=True,
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """No other process of this study is inside at the same time."""
        with open(self.folder / "study.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_unchanged(self) -> None:
        """Raise UserError for a study of another metric or space: its values say nothing here."""
        axes = sorted(self.axes, key=lambda axis: axis.name)
        space = {a.name: a.keys or [a.low, a.high, a.step, a.log] for a in axes}
        now = {"metric": self.metric, "space": json.dumps(space)}
        before = self.study.user_attrs
        for name, value in now.items():
            if before.get(name, value) != value:
                raise UserError(
                    f"{self.folder} holds a study of another {name}: choose another --output-dir"
                )
            self.study.set_user_attr(name, value)

    def _fail_abandoned(self) -> None:
        """Mark trials whose search is gone as failed, and end the trainings it left."""
        for frozen in self.study.get_trials(deepcopy=False, states=[self.states.RUNNING]):
            owner = self._owner_folder(frozen.number)
            try:
                owner.mkdir(parents=True, exist_ok=True)
                lock = RunLock(owner)
            except OptionError:
                continue  # another process is at it
            end_orphan(self.trial_folder(frozen.number))
            self.study.tell(frozen.number, state=self.states.FAIL)
            lock.release()
            print(f"trial {frozen.number}: left by a process that is gone, marked as failed")

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

    def trial_folder(self, number: int) -> Path:
        """Where trial ``number`` is trained."""
        return self.folder / f"trial-{number:04d}"

    def _owner_folder(self, number: int) -> Path:
        return self.folder / ".owners" / f"{number:04d}"

    # --- one trial --------------------------------------------------------------------------------

    def start(self, most: int, device: str) -> RunningTrial | None:
        """Start the next trial; None if the study has, or is getting, ``most`` of them."""
        with self._exclusive():
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
        shown = ", ".join(f"{name} {format_value(value)}" for name, value in values.items())
        print(f"trial {trial.number}: {shown}", flush=True)
        folder = self.trial_folder(trial.number)
        training = TrainingProcess.start(self.config, values, folder, device)
        return RunningTrial(trial, training, owner, device)

    def _sampler(self, number: int) -> Any:
        """What proposes trial ``number``; of two processes neither draws what the other does."""
        seed = (self.seed + 1_000_003 * number) % 2**32
        # Trials that run at the same time are kept from trying the same.
        return self.optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def follow(self, running: RunningTrial) -> None:
        """Pass on the epochs that were logged since; end the training if it is to be pruned."""
        epochs = self.config.run.epochs + self.config.schedule.cooldown_epochs
        for record in running.training.new_records():
            running.epoch = record["epoch"]
            value = record.get(self.metric)
            if value is None:
                continue
            running.values.append(value)
            running.trial.report(value, step=record["epoch"])
            over = record["epoch"] >= epochs
            if not (over or running.pruned) and running.trial.should_prune():
                running.pruned = True
                running.training.process.terminate()

    def finish(self, running: RunningTrial) -> bool:
        """Enter the result of a training that has ended; returns whether it counts."""
        self.follow(running)
        values = running.values
        best = (min if self.lower_is_better else max)(values) if values else None
        state, outcome = self._outcome(running, best)
        running.trial.set_user_attr("end", outcome)
        complete = state == self.states.COMPLETE
        self.study.tell(running.trial, best if complete else None, state=state)
        running.owner.release()
        running.training.remove_checkpoints(best_too=not complete)
        score = "" if best is None else f", {self.metric} {best:.4g}"
        print(f"trial {running.trial.number}: {outcome}{score}", flush=True)
        return state != self.states.FAIL

    def _outcome(self, running: RunningTrial, best: float | None) -> tuple[Any, str]:
        """Optuna's state of a training that has ended, and the state in words."""
        code = running.training.process.returncode
        if code == 0 and best is not None:
            # Also where the signal came too late.
            return self.states.COMPLETE, "done"
        if running.pruned:
            return self.states.PRUNED, f"pruned after {running.epoch} epochs"
        if code == DivergedError.exit_code:
            # For the sampler: as bad as can be, not unknown.
            return self.states.PRUNED, "diverged"
        return self.states.FAIL, f"failed with code {code}: {running.training.last_line()}"

    def stop(self, running: Sequence[RunningTrial]) -> None:
        """End trainings because the search was stopped; they count as failed."""
        for one in running:
            one.training.process.terminate()
        for one in running:
            one.training.wait()
            one.trial.set_user_attr("end", "the search was stopped")
            self.study.tell(one.trial, state=self.states.FAIL)
            one.owner.release()

    # --- results ----------------------------------------------------------------------------------

    def completed(self) -> list[Any]:
        """Trials with a result, the best one first."""
        done = self.study.get_trials(deepcopy=False, states=[self.states.COMPLETE])
        return sorted(done, key=lambda t: t.value, reverse=not self.lower_is_better)

    def values_of(self, frozen: Any) -> dict[str, Any]:
        """The options of a trial."""
        fixed = self.optuna.trial.FixedTrial(frozen.params)
        return {axis.name: axis.draw(fixed) for axis in self.axes}

    def write_results(self) -> None:
        """Write ``best.yaml`` and the plots, of all trials so far."""
        done = self.completed()
        if not done:
            return
        best = done[0]
        note = (
            f"Written by tools.tune: trial {best.number} of {len(self.study.trials)}, "
            f"{self.metric} {best.value:.4g}."
        )
        with self._exclusive():
            recipe.write(self.folder / "best.yaml", self.config, self.values_of(best), note)
            plot_history(self.folder / "history.png", self.study, self.metric, self.lower_is_better)
            plot_importance(self.folder / "importance.png", self.study, self.metric)


def format_value(value: Any) -> str:
    """An option's value for a line of text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
