"""pipeline/clock.py: throughput and the wait for images, by a clock that is set by hand."""

import pytest
import torch

from pipeline import clock
from pipeline.dataset import Batch


@pytest.fixture
def now(monkeypatch):
    """now[0]: what the clock shows, seconds."""
    shown = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: shown[0])
    return shown


def batches(now, *waits, size=4):
    """Batches of ``size`` images, each there after its seconds of waiting."""
    for seconds in waits:
        now[0] += seconds
        numbers = torch.arange(size)
        yield Batch(torch.zeros(size, 3, 2, 2), torch.zeros(size), numbers, numbers, [])


def test_the_time_is_split_into_waiting_and_the_rest(now):
    timer = clock.Clock(warm_up=True)
    for _ in timer.watch(batches(now, 1.0, 0.5)):
        now[0] += 1.25  # the step
    assert timer.lap() == clock.Lap(8 / 4, 1.5 / 4, 2.0, warm_up=True)


def test_a_lap_counts_from_the_last_one_and_only_the_first_is_warm_up(now):
    timer = clock.Clock(warm_up=True)
    now[0] += 50
    timer.lap()
    for _ in timer.watch(batches(now, 0.0, size=2)):
        now[0] += 0.5
    assert timer.lap() == clock.Lap(4.0, 0.0, 0.5, warm_up=False)


def test_a_lap_without_a_batch_or_any_time_is_zero(now):
    assert clock.Clock(warm_up=False).lap()[:2] == (0.0, 0.0)
