"""tools.common.timing: seconds of training and evaluation, on a clock of our own."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from before_training import SMALL

import config
import engine
from optimization.counts import Evaluation
from tools.common import timing
from tools.common.stage import Trial, single_process


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """[seconds], which time.monotonic of the module gives."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    return now


def trial_of(clock, seconds, batch, accum=1, workers=0):
    """A trial whose updates take ``seconds``, an iterator."""

    def train(updates, *, report, done):
        for _ in range(updates):
            clock[0] += next(seconds)
            report(SimpleNamespace(data_wait=0.25))
            if done():
                return

    return SimpleNamespace(
        train=train,
        settings=SimpleNamespace(
            batch_size=batch, accum_steps=accum, device=torch.device("cpu"), rank=0
        ),
        data=SimpleNamespace(train_loader=SimpleNamespace(num_workers=workers)),
    )


def test_updates_after_the_first_are_timed_and_scaled(clock):
    run = trial_of(clock, iter(()), 16, accum=4)
    tried = trial_of(clock, itertools.chain([9.0], itertools.repeat(2.0)), 8)
    training = timing.time_training(run, tried)
    assert training.seconds == pytest.approx(2.0 * 16 * 4 / 8)
    assert len(training.reports) == 1 + timing.TIMED
    assert training.data_wait == pytest.approx(0.25)


def test_images_that_were_ready_do_not_count(clock):
    """Two workers have four batches: only then it shows that images take three seconds."""
    seconds = itertools.chain([9.0] + 4 * [0.1], itertools.repeat(3.0))
    tried = trial_of(clock, seconds, 8, workers=2)
    assert timing.time_training(tried, tried).seconds == pytest.approx(3.0)


def test_long_updates_are_few(clock):
    tried = trial_of(clock, itertools.chain([90.0], itertools.repeat(20.0)), 8, workers=4)
    training = timing.time_training(tried, tried)
    assert len(training.reports) == 2 and training.seconds == pytest.approx(20.0)


def test_an_evaluation_is_scaled_to_the_whole_part(clock, monkeypatch):
    def evaluate(model, batches, settings, **_):
        count = 0
        for batch in batches:
            clock[0] += 4.0 if batch == 0 else 0.5
            count += 6
        return Evaluation(0.0, 0.0, None, count, *torch.zeros(3, 2))

    class Loader:
        batch_size, num_workers = 6, 0

        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return self.batches

        def __iter__(self):
            return iter(range(self.batches))

    monkeypatch.setattr(engine, "evaluate", evaluate)
    for batches, seconds in ((10, 10 * 0.5), (1, 4.0)):
        data = SimpleNamespace(val_loader=Loader(batches), val=range(6 * batches), class_names="ab")
        tried = SimpleNamespace(data=data, settings=None, state=SimpleNamespace(model=None))
        tried.counts = lambda: None
        assert timing.time_evaluation(tried)[1] == pytest.approx(seconds)


@pytest.mark.parametrize("slow, size", [(1e-9, 2), (1e9, 16)])
def test_what_takes_long_is_tried_with_fewer_images(monkeypatch, slow, size):
    """And changes nothing of the state."""
    monkeypatch.setattr(timing, "SLOW", slow)
    given = config.load([*SMALL, "--batch-size", "16"])
    with single_process(given) as (_, processes, device):
        trial = Trial(given, processes, device)
        before = {k: v.clone() for k, v in trial.state.model.state_dict().items()}
        tried = timing.affordable(trial)
        assert (tried is trial) == (size == 16)
        assert tried.settings.batch_size == tried.data.train_loader.batch_size == size
        assert all(torch.equal(v, before[k]) for k, v in trial.state.model.state_dict().items())
        assert trial.settings.batch_size == 16 and trial.data.steps == 1438 // 16
        tried.train(2)
    assert trial.state.progress.samples == 2 * size
