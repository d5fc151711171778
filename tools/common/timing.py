"""How long training and evaluation take here, from seconds of the real thing."""

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import engine
from optimization.multilabel import Result
from pipeline.dataset import Batch
from pipeline.workers import BATCHES_AHEAD
from tools.common.stage import Trial
from training.batch_size import rehearse

SLOW = 8.0  # seconds of an update from which on it is measured with fewer images
LIMIT = 15.0  # seconds of updates, and as many of evaluation, after the first
TIMED = 3  # updates or batches, where they fit into that


class Training(NamedTuple):
    """Some updates that were made."""

    reports: list[engine.StepReport]
    """One for each."""
    seconds: float
    """Of an update of the run, the wait for images included."""
    data_wait: float
    """Share of the time that images were waited for."""


def affordable(trial: Trial) -> Trial:
    """``trial``, or where an update would take long, the same with batches of fewer images.

    A forward and backward pass of two images says how long. A GPU is fast enough to do without.
    """
    if trial.settings.device.type != "cpu":
        return trial
    few = trial.with_batches_of(min(2, trial.settings.batch_size))
    began = time.monotonic()
    rehearse(few.parts)
    per_image = (time.monotonic() - began) / few.settings.batch_size
    if per_image * images_per_update(trial) <= SLOW:
        return trial
    size = max(few.settings.batch_size, int(SLOW / 2 / per_image))
    return trial.with_batches_of(min(size, trial.settings.batch_size))


def images_per_update(trial: Trial) -> int:
    return trial.settings.batch_size * trial.settings.accum_steps


def time_training(trial: Trial, tried: Trial) -> Training:
    """Train ``tried``, which is ``affordable(trial)``, for some updates.

    The first one does what is done only once, and the next ones find images that the workers had
    ready: both don't count where there is time for more. Raises engine.NonFinite.
    """
    reports: list[engine.StepReport] = []
    moments: list[float] = []

    def note(report: engine.StepReport) -> None:
        reports.append(report)
        moments.append(time.monotonic())

    ready = math.ceil(_ready(tried.data.train_loader) / tried.settings.accum_steps)
    tried.train(
        1 + ready + TIMED,
        report=note,
        done=lambda: len(moments) > 1 and moments[-1] - moments[0] > LIMIT,
    )
    laps = len(moments) - 1
    skipped = min(ready, max(laps - TIMED, laps // 2))
    laps -= skipped
    seconds = (moments[-1] - moments[skipped]) / laps
    waits = [report.data_wait for report in reports[1 + skipped :]]
    scale = images_per_update(trial) / images_per_update(tried)
    return Training(reports, seconds * scale, sum(waits) / laps)


def time_evaluation(tried: Trial) -> tuple[Result, float]:
    """Some batches of the validation part, evaluated; seconds that all of it would take."""
    loader = tried.data.val_loader
    batches = iter(loader)

    def evaluate(some: Iterable[Batch]) -> tuple[Result, float]:
        began = time.monotonic()
        result = engine.evaluate(
            tried.state.model,
            some,
            tried.settings,
            num_classes=len(tried.data.class_names),
            batch_size=loader.batch_size,
            counts=tried.counts(),
        )
        return result, time.monotonic() - began

    result, seconds = evaluate(itertools.islice(batches, 1))
    if len(loader) > 1:  # what is done only once lies behind
        more = itertools.islice(batches, TIMED + 2 * _ready(loader))
        result, seconds = evaluate(_for_a_while(more))
    share = result.count / len(tried.data.val)
    return result, seconds / share if share else 0.0


def _ready(loader: object) -> int:
    """Batches that workers have ready."""
    return loader.num_workers * BATCHES_AHEAD


def _for_a_while(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches until the limit of time, one at least."""
    began = time.monotonic()
    for batch in batches:
        yield batch
        if time.monotonic() - began > LIMIT:
            return
