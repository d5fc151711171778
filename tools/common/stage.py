"""Where a run's parts are tried before training: one process, one device."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import engine
from config import Config
from distributed.processes import Processes
from distributed.rendezvous import joined
from errors import OptionError
from optimization.counts import Counts
from optimization.multilabel import MultiLabelCounts, counts_of
from optimization.schedule import Schedule
from optimization.state import TrainState
from pipeline.cache import CachedLoader
from pipeline.loader import Loader
from training.build import Parts
from training.data import Data
from training.image_options import with_options_of_weights
from training.run import assemble, set_up_process


@contextmanager
def single_process(
    config: Config, *, finds_batch: bool = False
) -> Iterator[tuple[Config, Processes, torch.device]]:
    """``config`` as a run has it, this process and its device, set up as a run's is.

    Raises OptionError for what only a run can do; ``--batch-size auto`` is too, unless the tool
    ``finds_batch`` itself.
    """
    if config.data.batch_size == "auto" and not finds_batch:
        raise OptionError("batch_size", "auto is found by training itself: give a number here")
    with joined(config.dist, config.run.device) as processes:
        if processes.distributed:
            raise OptionError("distributed", "this tool runs in one process: start it by itself")
        device = set_up_process(config, processes)
        yield with_options_of_weights(config), processes, device


class Rates(Schedule):
    """A rate that goes from ``lowest`` to ``highest`` by the same factor at each update."""

    def __init__(self, lowest: float, highest: float, updates: int) -> None:
        super().__init__(highest)
        self.lowest = lowest
        self.highest = highest
        self.updates = updates

    def rate(self, t: int) -> float:
        share = t / (self.updates - 1) if self.updates > 1 else 0.0
        return self.lowest * (self.highest / self.lowest) ** share if self.lowest else 0.0


class Trial:
    """A run's parts and the engine's steps on them, without folder, log or moving average."""

    def __init__(self, config: Config, processes: Processes, device: torch.device) -> None:
        self.config = config
        self.parts: Parts = assemble(config, processes, device)
        self.data: Data = self.parts.data
        self.settings: engine.StepSettings = self.parts.settings
        self.state: TrainState = self.parts.state
        self.state.ema = None

    def counts(self) -> Counts | MultiLabelCounts:
        """What counts the answers of an evaluation, empty."""
        names, device = self.data.class_names, self.settings.device
        return counts_of(self.config.data.task, len(names), device)

    def with_batches_of(self, size: int) -> "Trial":
        """The same state, of which an update takes one batch of ``size`` images.

        They are no more than the run's own; evaluation takes as many at a time.
        """
        trial = copy.copy(self)
        train_loader = _resized(self.data.train_loader, size)
        trial.data = dataclasses.replace(
            self.data,
            train_loader=train_loader,
            val_loader=_resized(self.data.val_loader, min(size, self.data.val_loader.batch_size)),
            steps=len(train_loader),
        )
        trial.settings = dataclasses.replace(self.settings, batch_size=size, accum_steps=1)
        trial.parts = dataclasses.replace(self.parts, data=trial.data, settings=trial.settings)
        return trial

    def train(
        self,
        updates: int,
        *,
        report: Callable[[engine.StepReport], None] = lambda report: None,
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train for ``updates`` updates, epoch after epoch, or until they are ``done``.

        ``report`` gets every report of the engine. Raises engine.NonFinite.
        """
        progress = self.state.progress
        hooks = _Limit(self.state, progress.update + updates, report, done)
        while not hooks.reached:
            engine.train_one_epoch(
                self.state,
                self.parts.criterion,
                self.data.batches(progress.epoch, progress.samples),
                self.settings,
                steps=self.data.steps,
                mixer=self.parts.mixer_now,
                hooks=hooks,
            )
            if progress.step >= self.data.steps:
                progress.end_epoch()


def _resized(loader: Loader | CachedLoader, size: int) -> Loader | CachedLoader:
    """``loader`` with batches of ``size`` images."""
    settings = dataclasses.replace(loader.settings, batch_size=size)
    plain = Loader(loader.dataset, loader.sampler, settings)
    if isinstance(loader, CachedLoader):
        return CachedLoader(loader.store, plain, loader.transform, alter=loader.alter)
    return plain


class _Limit(engine.Hooks):
    """Stops at the update ``last``, or before when training is ``done``."""

    def __init__(
        self,
        state: TrainState,
        last: int,
        report: Callable[[engine.StepReport], None],
        done: Callable[[], bool],
    ) -> None:
        self.state, self.last = state, last
        self.done, self._report = done, report
        self.reached = False

    def report(self, report: engine.StepReport) -> None:
        self._report(report)

    def request(self) -> engine.StepRequest:
        self.reached = self.done() or self.state.progress.update >= self.last
        return engine.StepRequest.STOP if self.reached else engine.StepRequest.CONTINUE
