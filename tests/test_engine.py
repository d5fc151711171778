"""engine.py: accumulation, exact evaluation, no waits for the device, reports, requests."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_equal
from tiny_epochs import batches_of_bytes, in_batches, make_state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from augmentation.batch import BatchAugment
from augmentation.mixing import Mixer
from augmentation.preprocessing import Preprocessing
from config import AugmentOptions
from engine import StepRequest
from losses import CrossEntropy
from optimization.counts import Evaluation
from optimization.guard import Guard
from optimization.state import Progress, TrainState
from pipeline.dataset import Batch

CPU = torch.device("cpu")


class Recorder(engine.Hooks):
    """Keeps what the engine reports; answers ``requests`` after the updates, then CONTINUE."""

    def __init__(self, requests: list[StepRequest] | None = None) -> None:
        self.reports: list[engine.StepReport] = []
        self.requests = list(requests or [])
        self.saved: list[int] = []
        self.left_out: list[tuple[int, int, int]] = []
        self.progress: Progress | None = None

    def report(self, report: engine.StepReport) -> None:
        self.reports.append(report)

    def request(self) -> StepRequest:
        return self.requests.pop(0) if self.requests else StepRequest.CONTINUE

    def save(self) -> None:
        self.saved.append(self.progress.update)

    def skipped(self, count: int, step: int, update: int) -> None:
        self.left_out.append((count, step, update))


def plain_sgd(model: nn.Module, lr: float = 0.1) -> TrainState:
    """Weights minus ``lr`` times the gradient, nothing else."""
    return make_state(model, opt="momentum", lr=lr, optim={"momentum": 0.0, "weight_decay": 0.0})


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Linear(8, 4))


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accum, expected_windows", [(1, [4] * 5), (2, [8, 8, 4]), (3, [12, 8]), (9, [20])]
)
def test_accumulation_equals_larger_batches(accum, expected_windows):
    """A window's gradients are those of its images in one batch, in a short last window too."""
    images, targets = torch.randn(20, 3, 8, 8), torch.randint(0, 3, (20,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    reference = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    reference.load_state_dict(model.state_dict())
    state = plain_sgd(model)
    settings = engine.StepSettings(CPU, batch_size=4, accum_steps=accum)
    batches = in_batches(images, targets, 4)
    assert engine.train_one_epoch(state, CrossEntropy(), batches, settings, steps=5)
    assert state.progress.update == len(expected_windows)
    assert state.progress.step == 5 and state.progress.samples == 20
    start = 0
    for size in expected_windows:
        loss = nn.functional.cross_entropy(
            reference(images[start : start + size]), targets[start : start + size]
        )
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= 0.1 * p.grad
        start += size
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_requests_save_and_stop_at_updates():
    """Windows of two batches: saved after the second update, stopped after the third."""
    images, targets = torch.randn(20, 3, 16, 16), torch.randint(0, 4, (20,))
    state = plain_sgd(small_model())
    hooks = Recorder([StepRequest.CONTINUE, StepRequest.SAVE, StepRequest.STOP])
    hooks.progress = state.progress
    settings = engine.StepSettings(CPU, batch_size=2, accum_steps=2)
    batches = in_batches(images, targets, 2)
    finished = engine.train_one_epoch(
        state, CrossEntropy(), batches, settings, steps=10, hooks=hooks
    )
    assert not finished
    assert hooks.saved == [2]
    progress = state.progress
    assert (progress.update, progress.step, progress.samples) == (3, 6, 12)
    # What was trained is counted, though no report was due.
    assert progress.loss_count == 6


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("opt", ["adamw", "lamb", "lookahead_lion"])
def test_an_update_that_is_not_finite_is_left_out_or_raised(opt, waits, monkeypatch):
    """The third batch of five holds a NaN. Without ``waits`` as on a CUDA device."""

    def build(*arguments: Any, **options: Any) -> Guard:
        return Guard(*arguments, **options | {"waits": waits})

    monkeypatch.setattr(engine, "Guard", build)
    images, targets = torch.randn(20, 3, 16, 16), torch.randint(0, 4, (20,))
    images[9] = float("nan")
    batches = in_batches(images, targets, 4)
    state, hooks = make_state(small_model(), opt=opt), Recorder()
    settings = engine.StepSettings(CPU, batch_size=4, on_nonfinite="skip")
    engine.train_one_epoch(state, CrossEntropy(), batches, settings, steps=5, hooks=hooks)
    assert hooks.left_out == [(1, 2, 2)]
    assert state.progress.update == 5 and state.progress.skipped == 1
    # As if the batch had never been.
    without = make_state(small_model(), opt=opt)
    batches.pop(2)
    engine.train_one_epoch(without, CrossEntropy(), batches, settings, steps=5)
    for part in ("model", "optimizer"):
        assert_equal(state.state_dict()[part], without.state_dict()[part], part)

    stopped = make_state(small_model(), opt=opt)
    settings = engine.StepSettings(CPU, batch_size=4)
    batches = in_batches(images, targets, 4)
    with pytest.raises(engine.NonFinite) as failure:
        engine.train_one_epoch(stopped, CrossEntropy(), batches, settings, steps=5)
    assert (failure.value.step, failure.value.update) == (2, 2)
    before = make_state(small_model(), opt=opt)
    engine.train_one_epoch(before, CrossEntropy(), batches[:2], settings, steps=5)
    for part in ("model", "optimizer"):
        assert_equal(stopped.state_dict()[part], before.state_dict()[part], part)


# --- waits and reports --------------------------------------------------------------------------

# What makes the host wait until a device has caught up.
WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique2",
)


class Counting(TorchDispatchMode):
    """Counts the operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        if name == "index" and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1]
        ):
            self.waits["index by a mask"] += 1
        return operation(*arguments, **(keywords or {}))


def settings_of_recipe(**changes: Any) -> engine.StepSettings:
    """Batches of six that are augmented as in the DeiT recipe."""
    preprocessing = Preprocessing(16, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    augment = BatchAugment(preprocessing, AugmentOptions(recount=2), 0)
    values = {"device": CPU, "batch_size": 6, "prepare": augment, "log_interval": 10}
    return engine.StepSettings(**{**values, **changes})


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
@pytest.mark.parametrize("changes", [{}, {"clip_grad": 1.0}, {"accum_steps": 2}])
def test_host_waits_for_the_device_at_log_steps_only(opt, changes):
    """20 updates with a report at the first, the tenth and the last: three reads, nothing else."""
    settings = settings_of_recipe(**changes)
    steps = 20 * settings.accum_steps
    state, hooks = make_state(small_model(), opt=opt, ema=True), Recorder()
    with Counting() as counting:
        engine.train_one_epoch(
            state,
            CrossEntropy(),
            batches_of_bytes(steps, settings.prepare),
            settings,
            steps=steps,
            mixer=Mixer(4, 0.8, 1.0),
            hooks=hooks,
        )
    assert state.progress.update == 20
    assert len(hooks.reports) == 3
    # Each read is one tensor to the host (``tolist``), which isn't an operation of its own.
    assert not counting.waits


def test_counting_sees_a_wait():
    with Counting() as counting:
        x = torch.ones(3)
        float(x.sum())
        x[x > 0]
    assert counting.waits.keys() == {"_local_scalar_dense", "index by a mask"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("changes", [{}, {"clip_grad": 1.0}, {"accum_steps": 2}])
def test_no_synchronisation_on_cuda(changes):
    """torch raises at the first wait, from after the first report until before the last read."""
    device = torch.device("cuda")
    settings = settings_of_recipe(device=device, log_interval=1000, amp=torch.bfloat16, **changes)
    state = make_state(small_model().to(device), ema=True)
    seen = []

    def strict_in_the_middle() -> Iterator[Batch]:
        try:
            for number, batch in enumerate(batches_of_bytes(40, settings.prepare)):
                # Some batches are fetched ahead of the step.
                if number == 10:
                    assert state.progress.update > 1
                    torch.cuda.set_sync_debug_mode("error")
                    with pytest.raises(RuntimeError, match="synchronizing"):
                        torch.ones(1, device=device).item()
                seen.append(torch.cuda.get_sync_debug_mode())
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")

    try:
        engine.train_one_epoch(
            state,
            CrossEntropy(),
            strict_in_the_middle(),
            settings,
            steps=1000,  # the epoch is not over, so there is no report at the end
            mixer=Mixer(4, 0.8, 1.0),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.progress.step == 40
    assert seen == [0] * 10 + [2] * 30


def test_reports_leave_the_warm_up_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    images, targets = torch.randn(120, 3, 16, 16), torch.randint(0, 4, (120,))

    def slow() -> Iterator[Batch]:
        for i, batch in enumerate(in_batches(images, targets, 6)):
            now[0] += 100.0 if i == 0 else 1.0  # a start, and a second of waiting each time
            yield batch

    class Model(nn.Linear):
        def forward(self, x):
            now[0] += 3.0
            return super().forward(x.flatten(1))

    state, hooks = make_state(Model(3 * 16 * 16, 4)), Recorder()
    settings = engine.StepSettings(CPU, batch_size=6, log_interval=10, macs=100, peak=6000.0)
    engine.train_one_epoch(state, CrossEntropy(), slow(), settings, steps=20, hooks=hooks)
    first, second, third = hooks.reports
    assert first.warm_up and not second.warm_up and not third.warm_up
    assert first.step_seconds == 103.0
    for report in (second, third):
        assert report.step_seconds == 4.0
        assert report.images_per_second == 6 / 4
        assert report.data_wait == 1 / 4
        # 6 × 100 operations per image, 1.5 images per second, of 6000 operations per second.
        assert report.utilisation == pytest.approx(6 * 100 * 1.5 / 6000)
        assert report.memory > 1 << 20
    assert state.warm
    # A resumed session has no report of its first update, but the same warm-up to leave out.
    state.warm, state.progress = False, Progress(update=1)
    hooks = Recorder()
    engine.train_one_epoch(state, CrossEntropy(), slow(), settings, steps=20, hooks=hooks)
    assert [r.step_seconds for r in hooks.reports] == [4.0, 4.0, 4.0]
    assert not any(r.warm_up for r in hooks.reports)


# --- evaluation ---------------------------------------------------------------------------------


def lookup(logits: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """A model that gives row i of ``logits`` for image i, and the images."""

    class Lookup(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits[x[:, 0, 0, 0].long()]

    images = torch.zeros(len(logits), 3, 2, 2)
    images[:, 0, 0, 0] = torch.arange(len(logits))
    return Lookup(), images


def evaluated(logits: torch.Tensor, targets: torch.Tensor, size: int) -> Evaluation:
    """The engine's result with batches of ``size``."""
    model, images = lookup(logits)
    return engine.evaluate(
        model,
        in_batches(images, targets, size),
        engine.StepSettings(CPU),
        num_classes=logits.shape[1],
        batch_size=size,
    )


@pytest.mark.parametrize("size", [1, 3, 7, 23])
def test_evaluation_is_exact_for_every_batch_size(size):
    torch.manual_seed(1)
    logits, targets = torch.randn(23, 6), torch.randint(0, 6, (23,))
    result = evaluated(logits, targets, size)
    order = logits.argsort(1, descending=True)
    assert result.count == 23
    assert result.acc1 == 100 * sum(int(order[i, 0] == targets[i]) for i in range(23)) / 23
    assert result.acc5 == 100 * sum(int(targets[i] in order[i, :5]) for i in range(23)) / 23
    exponentials = np.exp(logits.double().numpy())
    shares = exponentials[np.arange(23), targets] / exponentials.sum(1)
    exact = -np.log(shares).mean()
    assert result.loss == pytest.approx(exact, abs=1e-6)
    assert result.count_per_class.tolist() == torch.bincount(targets, minlength=6).tolist()
    right = order[:, 0] == targets
    assert result.correct_per_class.tolist() == torch.bincount(targets[right], minlength=6).tolist()


def test_a_loss_that_is_not_finite_shows_and_the_counts_stay():
    logits = torch.tensor([[2.0, 1.0], [float("nan"), 0.0], [0.0, 3.0]])
    result = evaluated(logits, torch.tensor([0, 1, 1]), 2)
    assert np.isnan(result.loss)
    assert result.count == 3 and result.correct_per_class[0] == 1
    assert result.acc5 is None  # two classes
