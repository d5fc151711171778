"""Where a run's parts are tried before training: one process, one device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import engine
import rendezvous
import utils
from augment import Mixer, build_mixer
from build import Data, build_data, step_options
from config import Config
from errors import OptionError
from optim import Schedule
from training import Parts, assemble


@contextmanager
def single_process(config: Config) -> Iterator[tuple[utils.Processes, torch.device]]:
    """This process and its device, set up as a run's is.

    Raises OptionError for what only a run can do.
    """
    if config.data.batch_size == "auto":
        raise OptionError("batch_size", "auto is found by training itself: give a number here")
    with rendezvous.joined(config.dist, config.run.device) as processes:
        if processes.distributed:
            raise OptionError("distributed", "this tool runs in one process: start it by itself")
        utils.setup_messages(processes)
        device = utils.pick_device(config.run.device)
        utils.set_determinism(config.run.deterministic)
        utils.import_plugins(config.run.plugin)
        yield processes, device


class Rates(Schedule):
    """A rate that goes from ``lowest`` to ``highest`` by the same factor at each update."""

    def __init__(self, lowest: float, highest: float, updates: int) -> None:
        self.lowest = lowest
        self.highest = highest
        self.updates = updates
        self.factor = 1.0
        self.last = 0.0

    def rate(self, t: int) -> float:
        share = t / (self.updates - 1) if self.updates > 1 else 0.0
        return self.lowest * (self.highest / self.lowest) ** share if self.lowest else 0.0


class Trial:
    """A run's parts and the engine's steps on them, without folder, log or moving average."""

    def __init__(self, config: Config, processes: utils.Processes, device: torch.device) -> None:
        self.config = config
        self.data: Data = build_data(config, processes)
        self.parts: Parts = assemble(config, processes, device, self.data)
        self.state = self.parts.state
        self.state.ema = None
        self.mixer: Mixer | None = build_mixer(config.augment, len(self.data.class_names))
        self.options = step_options(config, processes, device, self.data, self.state.model)

    def train(self, updates: int, **watching: Any) -> None:
        """Train for ``updates`` updates, epoch after epoch, or until ``wish`` says to stop.

        ``watching``: report and wish, as of engine.train_one_epoch. Raises engine.NonFinite.
        """
        wish = watching.pop("wish", lambda: engine.Wish.GO)
        progress, stopped = self.state.progress, False
        last = progress.update + updates

        def stop_at_last() -> engine.Wish:
            nonlocal stopped
            stopped = wish() is engine.Wish.STOP or progress.update >= last
            return engine.Wish.STOP if stopped else engine.Wish.GO

        while not stopped:
            engine.train_one_epoch(
                self.state,
                self.parts.criterion,
                self.data.batches(progress.epoch, progress.samples),
                self.options,
                steps=self.data.steps,
                mixer=self.mixer,
                wish=stop_at_last,
                **watching,
            )
            if progress.step >= self.data.steps:
                progress.end_epoch()
