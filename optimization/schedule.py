"""The learning rate as a function of the update."""

import logging
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from config import ScheduleOptions
from errors import OptionError

log = logging.getLogger(__name__)


class Schedule(ABC):
    """Sets an optimiser's learning rate at each update, counted from 0.

    Args:
        lr: peak rate.

    Attributes:
        factor: multiplies the rate; halved when training is rolled back. Part of the state.
        last: rate that :meth:`apply` set last, of groups whose lr_scale is 1.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.factor = 1.0
        self.last = 0.0

    @abstractmethod
    def rate(self, t: int) -> float:
        """Learning rate of update ``t``, before ``factor`` and ``lr_scale``."""

    def apply(self, optimizer: torch.optim.Optimizer, t: int) -> None:
        """Set the learning rates of ``optimizer`` for update ``t``."""
        self.last = self.rate(t) * self.factor
        for group in optimizer.param_groups:
            group["lr"] = self.last * group.get("lr_scale", 1.0)

    def end_epoch(self, metric: float | None, epochs: int = 1) -> None:  # noqa: B027  (for plateau)
        """Take note of an epoch's metric, ``epochs`` after the last one that had any; None where
        nothing was measured."""

    def restart(self) -> None:
        """Forget that the rate was lowered, for another one that was asked for."""
        self.factor = 1.0

    def forget_metric(self) -> None:  # noqa: B027  (only plateau looks at it)
        """Forget the values of a metric that is another one now."""

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {"factor": self.factor, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned; the options may have changed since."""
        self.factor, self.last = state["factor"], state["last"]


def build_schedule(
    options: ScheduleOptions,
    *,
    lr: float,
    epochs: int,
    updates_per_epoch: int,
    lower_is_better: bool = False,
    seed: int = 0,
    required: Collection[str] = (),
) -> Schedule:
    """The schedule that ``options`` describe.

    The rate starts at ``warmup_lr``, rises in a straight line to ``lr`` over ``warmup_epochs``,
    goes on as ``sched`` says until ``epochs`` are over, and stays at its end during the cool-down.
    The warm-up is part of the schedule's length, as in DeiT. A cosine therefore goes on, after the
    warm-up, from where it would be without one.

    Args:
        options: kind and shape.
        lr: peak rate.
        epochs: length without the cool-down.
        updates_per_epoch: optimiser steps per epoch.
        lower_is_better: of plateau's metric.
        seed: of the noise.
        required: options that were asked for. A ``warmup_lr`` or ``min_lr`` above ``lr`` raises if
            it is one of them, else it is replaced by 0 with a note in the log.

    Raises:
        OptionError: a rate above the peak, or a plateau that doesn't lower the rate.
    """
    span = Span(
        lr=lr,
        warmup_lr=_floor(options, "warmup_lr", lr, required),
        min_lr=_floor(options, "min_lr", lr, required),
        warmup=round(options.warmup_epochs * updates_per_epoch),
        total=epochs * updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
    )
    if options.sched == "plateau":
        return PlateauSchedule(options, span, lower_is_better=lower_is_better)
    return CurveSchedule(options, span, seed=seed)


def _floor(options: ScheduleOptions, name: str, lr: float, required: Collection[str]) -> float:
    """``warmup_lr`` or ``min_lr``, which must not lie above the peak rate."""
    value = getattr(options, name)
    if value <= lr:
        return value
    if name in required:
        raise OptionError(name, f"{value:g} is above the learning rate {lr:g}: lower it")
    log.info("--%s %g is above the learning rate %g: 0 is used", name.replace("_", "-"), value, lr)
    return 0.0


@dataclass(frozen=True)
class Span:
    """The rates and lengths that all kinds share."""

    lr: float
    """Peak rate."""
    warmup_lr: float
    """First rate of the warm-up."""
    min_lr: float
    """Lowest rate."""
    warmup: int
    """Length of the warm-up in updates."""
    total: int
    """Length of the schedule in updates, with the warm-up and without the cool-down."""
    updates_per_epoch: int

    def updates(self, epochs: float) -> int:
        """The updates of so many epochs, at least one."""
        return max(1, round(epochs * self.updates_per_epoch))


# --- kinds ----------------------------------------------------------------------------------------
# Update and rates as of timm 1.0's schedulers, to the last digit.


def cosine(options: ScheduleOptions, span: Span, t: int) -> float:
    """Half a cosine from ``lr`` to ``min_lr`` (Loshchilov and Hutter 2017, eq. 5)."""
    return span.min_lr + 0.5 * (span.lr - span.min_lr) * (1 + math.cos(math.pi * t / span.total))


def cosine_restarts(options: ScheduleOptions, span: Span, t: int) -> float:
    """Cosines one after another, each ``restart_mul`` times as long as the one before."""
    epochs = (
        span.total / 4 / span.updates_per_epoch
        if options.restart_epochs is None
        else options.restart_epochs
    )
    first = span.updates(epochs)
    if options.restart_mul == 1:
        cycle, length = t // first, float(first)
        done = float(t - first * cycle)
    else:
        # Of a geometric series: the cycles before cycle i take first · (1 - mul ** i) / (1 - mul).
        cycle = math.floor(math.log(1 - t / first * (1 - options.restart_mul), options.restart_mul))
        length = options.restart_mul**cycle * first
        done = t - (1 - options.restart_mul**cycle) / (1 - options.restart_mul) * first
    peak = span.lr * options.restart_decay**cycle
    return span.min_lr + 0.5 * (peak - span.min_lr) * (1 + math.cos(math.pi * done / length))


def poly(options: ScheduleOptions, span: Span, t: int) -> float:
    """A power of the share that is left."""
    return span.min_lr + (span.lr - span.min_lr) * (1 - t / span.total) ** options.poly_power


def step(options: ScheduleOptions, span: Span, t: int) -> float:
    """``decay_rate`` times the rate after every ``decay_epochs``."""
    return span.lr * options.decay_rate ** (t // span.updates(options.decay_epochs))


def multistep(options: ScheduleOptions, span: Span, t: int) -> float:
    """``decay_rate`` times the rate after each of ``decay_milestones``."""
    milestones = sorted(span.updates(epoch) for epoch in options.decay_milestones)
    return span.lr * options.decay_rate ** bisect_right(milestones, t)


def constant(options: ScheduleOptions, span: Span, t: int) -> float:
    """The peak rate."""
    return span.lr


def onecycle(options: ScheduleOptions, span: Span, t: int) -> float:
    """One cycle (Smith 2018), as torch's OneCycleLR with cosines: up, then down."""
    peak, end = span.warmup - 1, span.total - 1
    if t <= peak:
        return _half_cosine(span.warmup_lr, span.lr, t / peak if peak else 1.0)
    start = max(peak, 0)
    return _half_cosine(span.lr, span.min_lr, (min(t, end) - start) / max(end - start, 1))


def _half_cosine(start: float, end: float, share: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


_CURVES: dict[str, Callable[[ScheduleOptions, Span, int], float]] = {
    "cosine": cosine,
    "cosine-restarts": cosine_restarts,
    "poly": poly,
    "step": step,
    "multistep": multistep,
    "constant": constant,
    "onecycle": onecycle,
}
_ENDS_AT_MIN_LR = ("cosine", "cosine-restarts", "poly")


class CurveSchedule(Schedule):
    """A rate that depends on the update alone."""

    def __init__(self, options: ScheduleOptions, span: Span, *, seed: int = 0) -> None:
        super().__init__(span.lr)
        self.options = options
        self.span = span
        self.seed = seed

    def rate(self, t: int) -> float:
        options, span = self.options, self.span
        if options.sched == "onecycle":  # with a warm-up of its own
            return onecycle(options, span, t)
        if t >= span.total and options.sched in _ENDS_AT_MIN_LR:
            return span.min_lr
        t = min(t, span.total - 1)
        if t < span.warmup:
            rate = span.warmup_lr + t * ((span.lr - span.warmup_lr) / span.warmup)
        else:
            rate = _CURVES[options.sched](options, span, t)
        return rate + rate * self._noise(t) if self._is_noisy(t) else rate

    def _is_noisy(self, t: int) -> bool:
        if self.options.lr_noise is None:
            return False
        start, stop = (*self.options.lr_noise, 1.0)[:2]
        return start * self.span.total <= t < stop * self.span.total

    def _noise(self, t: int) -> float:
        """What is added to the rate, as a share of it: normal, drawn anew until in the limits."""
        generator = torch.Generator().manual_seed(self.seed + t)
        while True:
            noise = torch.randn(1, generator=generator).item() * self.options.lr_noise_std
            if abs(noise) < self.options.lr_noise_pct:
                return noise


class PlateauSchedule(Schedule):
    """After the warm-up a rate that falls when the metric has not improved for a while.

    As torch's ReduceLROnPlateau: an improvement is one by more than 0.01 %, and after more than
    ``patience_epochs`` epochs without one the rate is multiplied by ``decay_rate``.
    """

    THRESHOLD = 1e-4
    LEAST_CHANGE = 1e-8

    def __init__(self, options: ScheduleOptions, span: Span, *, lower_is_better: bool) -> None:
        if options.decay_rate >= 1:
            raise OptionError("decay_rate", "--sched plateau needs one below 1")
        super().__init__(span.lr)
        self.options = options
        self.span = span
        self.lower_is_better = lower_is_better
        self.level = span.lr
        """The rate outside the warm-up; part of the state, as the two below are."""
        self.best: float
        self.bad_epochs: int
        """Epochs since the best one, or since the rate fell."""
        self.forget_metric()

    def rate(self, t: int) -> float:
        span = self.span
        if t < span.warmup:
            return span.warmup_lr + t * (self.level - span.warmup_lr) / span.warmup
        return self.level

    def end_epoch(self, metric: float | None, epochs: int = 1) -> None:
        if metric is None:
            return
        if self._is_better(metric):
            self.best, self.bad_epochs = metric, 0
        else:
            self.bad_epochs += epochs
        if self.bad_epochs > self.options.patience_epochs:
            self.bad_epochs = 0
            lowered = max(self.level * self.options.decay_rate, self.span.min_lr)
            if self.level - lowered > self.LEAST_CHANGE:
                self.level = lowered

    def _is_better(self, metric: float) -> bool:
        if self.lower_is_better:
            return metric < self.best * (1 - self.THRESHOLD)
        return metric > self.best * (1 + self.THRESHOLD)

    def restart(self) -> None:
        super().restart()
        self.level, self.bad_epochs = self.lr, 0

    def forget_metric(self) -> None:
        self.best = math.inf if self.lower_is_better else -math.inf
        self.bad_epochs = 0

    def state_dict(self) -> dict[str, Any]:
        plateau = {"lr": self.level, "best": self.best, "num_bad_epochs": self.bad_epochs}
        return super().state_dict() | {"plateau": plateau | {"peak": self.lr}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "plateau" in state:
            saved = state["plateau"]
            # The peak may be another one now, by the images of an update.
            scale = self.lr / saved["peak"] if saved.get("peak") else 1.0
            self.level, self.best = saved["lr"] * scale, saved["best"]
            self.bad_epochs = saved["num_bad_epochs"]
