"""engine.py: that it doesn't wait for the device, and what it says of itself."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from augment import Mixer, Preprocessing
from batch_augment import BatchAugment
from config import AugmentOptions, OptimOptions, ScheduleOptions
from datasets import Batch
from losses import CrossEntropy
from optim import Schedule, build_optimizer
from state import ModelEma, Progress, TrainState

CPU = torch.device("cpu")
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


def make_state(opt="adamw", ema=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Linear(8, 4))
    model.no_weight_decay = lambda: set()
    optimizer = build_optimizer(model, OptimOptions(opt=opt), lr=1e-3)
    schedule = Schedule(ScheduleOptions(), lr=1e-3, epochs=10, updates_per_epoch=20)
    average = ModelEma(model, 0.9) if ema else None
    return TrainState(model, optimizer, schedule, None, average, lambda m: m, Progress())


def batches(count, augment=None, size=6):
    rng = np.random.RandomState(0)
    for i in range(count):
        images = torch.from_numpy(rng.randint(0, 256, (size, 3, 16, 16), dtype=np.uint8))
        positions = np.arange(i * size, (i + 1) * size)
        yield Batch(
            images if augment else images.float(),
            torch.from_numpy(rng.randint(0, 4, size)),
            torch.from_numpy(positions),
            torch.from_numpy(positions),
            [],
            augment.plan(0, positions) if augment else None,
        )


def options(**changes):
    preprocessing = Preprocessing(16, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    augment = BatchAugment(preprocessing, AugmentOptions(recount=2), 0)
    values = {"device": CPU, "batch_size": 6, "prepare": augment, "log_interval": 10}
    return engine.StepOptions(**{**values, **changes})


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
@pytest.mark.parametrize("changes", [{}, {"clip_grad": 1.0}, {"accum_steps": 2}])
def test_host_waits_for_the_device_at_log_steps_only(opt, changes):
    """20 updates with a report at the first, the tenth and the last: three reads, nothing else."""
    chosen = options(**changes)
    steps = 20 * chosen.accum_steps
    state, reports = make_state(opt), []
    with Counting() as counting:
        engine.train_one_epoch(
            state,
            CrossEntropy(),
            batches(steps, chosen.prepare),
            chosen,
            steps=steps,
            mixer=Mixer(4, 0.8, 1.0),
            report=reports.append,
        )
    assert state.progress.update == 20
    assert len(reports) == 3
    # Each read is one tensor to the host (``tolist``), which isn't an operation of its own.
    assert not counting.waits


def test_counting_sees_a_wait():
    with Counting() as counting:
        x = torch.ones(3)
        float(x.sum())
        x[x > 0]
    assert counting.waits.keys() == {"_local_scalar_dense", "index by a mask"}


def test_reports_leave_the_warm_up_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])

    def slow():
        for i, batch in enumerate(batches(20)):
            now[0] += 100.0 if i == 0 else 1.0  # a start, and a second of waiting each time
            yield batch

    class Model(nn.Linear):
        def forward(self, x):
            now[0] += 3.0
            return super().forward(x.flatten(1))

    state = make_state()
    state.model = state.net = Model(3 * 16 * 16, 4)
    reports = []
    engine.train_one_epoch(
        state, CrossEntropy(), slow(), options(macs=100, peak=6000.0), steps=20,
        report=reports.append,
    )  # fmt: skip
    first, second, third = reports
    assert first.warm_up and not second.warm_up and not third.warm_up
    assert first.step_seconds == 103.0
    for report in (second, third):
        assert report.step_seconds == 4.0
        assert report.images_per_second == 6 / 4
        assert report.data_wait == 1 / 4
        # 6 × 100 operations a picture, 1.5 pictures a second, of 6000 a second.
        assert report.utilisation == pytest.approx(6 * 100 * 1.5 / 6000)
        assert report.memory > 1 << 20
    assert state.warm
    # A resumed session has no report of its first update, but the same warm-up to leave out.
    state.warm, state.progress = False, Progress(update=1)
    reports.clear()
    engine.train_one_epoch(
        state, CrossEntropy(), slow(), options(), steps=20, report=reports.append
    )  # fmt: skip
    assert [r.step_seconds for r in reports] == [4.0, 4.0, 4.0]
    assert not any(r.warm_up for r in reports)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_synchronisation_on_cuda():
    device = torch.device("cuda")
    chosen = options(device=device, log_interval=1000, amp=torch.bfloat16)
    state = make_state()
    state.model.to(device)
    state.ema.module.to(device)
    state = TrainState(
        state.model, build_optimizer(state.model, OptimOptions(), lr=1e-3), state.schedule, None,
        ModelEma(state.model, 0.9), lambda m: m, Progress(),
    )  # fmt: skip
    loader = list(batches(20, chosen.prepare))
    run = lambda some, steps: engine.train_one_epoch(  # noqa: E731
        state, CrossEntropy(), some, chosen, steps=steps, mixer=Mixer(4, 0.8, 1.0)
    )
    run(iter(loader[:2]), 100)  # the warm-up, and its report, are read
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Leaves before the end, so that nothing is read.
        for batch in engine._ahead(loader[2:], chosen):
            loss = engine._forward(state, CrossEntropy(), batch, chosen, 3, Mixer(4, 0.8, 1.0))
            loss.backward()
            engine._update(state, engine._Meter(device), chosen, 3, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
