"""Learning rates against closed formulas, timm's schedulers and torch's."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import scheduler
from tiny_models import tiny_vit

from config import OptimOptions, ScheduleOptions
from errors import OptionError
from optimization.optimizer import build_optimizer
from optimization.schedule import Schedule, build_schedule

UPDATES = 10
EPOCHS = 20
TOTAL = UPDATES * EPOCHS
LR = 0.1


def schedule(**options) -> Schedule:
    extra = {k: options.pop(k) for k in ("lower_is_better", "seed", "required") if k in options}
    options = {"warmup_epochs": 2, "warmup_lr": 1e-3, "min_lr": 1e-4} | options
    return build_schedule(
        ScheduleOptions(**options), lr=LR, epochs=EPOCHS, updates_per_epoch=UPDATES, **extra
    )


def cosine(t: int, length: int = TOTAL, low: float = 1e-4, high: float = LR) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * t / length)) / 2


FORMULAS = {
    "cosine": ({}, cosine),
    "constant": ({}, lambda t: LR),
    "poly": ({"poly_power": 2.0}, lambda t: 1e-4 + (LR - 1e-4) * (1 - t / TOTAL) ** 2),
    "step": ({"decay_epochs": 7, "decay_rate": 0.5}, lambda t: LR * 0.5 ** (t // 70)),
    "multistep": (
        {"decay_milestones": (9.5, 5), "decay_rate": 0.2},
        lambda t: LR * 0.2 ** ((t >= 50) + (t >= 95)),
    ),
    "cosine-restarts": (
        {"restart_epochs": 5, "restart_decay": 0.5},
        lambda t: cosine(t % 50, 50, high=LR * 0.5 ** (t // 50)),
    ),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_schedule_equals_its_formula(kind):
    options, formula = FORMULAS[kind]
    ours = schedule(sched=kind, **options)
    for t in range(TOTAL):
        expected = formula(t) if t >= 20 else 1e-3 + t * (LR - 1e-3) / 20
        assert ours.rate(t) == pytest.approx(expected, rel=1e-9), t
    assert ours.rate(0) == 1e-3


def test_restarts_double_in_length():
    ours = schedule(sched="cosine-restarts", restart_epochs=5, restart_mul=2, warmup_epochs=0)
    assert ours.rate(50) == pytest.approx(LR)
    assert ours.rate(49) == pytest.approx(cosine(49, 50))
    assert ours.rate(100) == pytest.approx(cosine(50, 100))
    assert ours.rate(150) == pytest.approx(LR)


def test_restarts_by_default_come_after_each_quarter():
    ours = schedule(sched="cosine-restarts", warmup_epochs=0)
    assert [t for t in range(TOTAL) if ours.rate(t) == pytest.approx(LR)] == [0, 50, 100, 150]


@pytest.mark.parametrize("kind", ["cosine", "cosine-restarts", "poly", "onecycle"])
def test_cooldown_stays_at_the_lowest_rate(kind):
    ours = schedule(sched=kind)
    for t in (TOTAL, TOTAL + 1, TOTAL + 57):
        assert ours.rate(t) == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", ["step", "multistep", "constant"])
def test_cooldown_stays_at_the_last_rate(kind):
    ours = schedule(sched=kind, decay_epochs=10, decay_milestones=(5, 20))
    assert ours.rate(TOTAL) == ours.rate(TOTAL + 99) == ours.rate(TOTAL - 1) > 0


@pytest.mark.parametrize("warmup", [0, 0.5, 6])
def test_onecycle_equals_torch(warmup):
    ours = schedule(sched="onecycle", warmup_epochs=warmup)
    slot = torch.optim.SGD([torch.zeros(1)], lr=LR)
    if warmup:
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            slot,
            max_lr=LR,
            total_steps=TOTAL,
            pct_start=warmup / EPOCHS,
            div_factor=LR / 1e-3,
            final_div_factor=1e-3 / 1e-4,
            cycle_momentum=False,
        )
    for t in range(TOTAL):
        expected = slot.param_groups[0]["lr"] if warmup else cosine(t, TOTAL - 1)
        assert ours.rate(t) == pytest.approx(expected, rel=1e-6), t
        if warmup and t < TOTAL - 1:
            slot.step()
            theirs.step()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*FORMULAS, "onecycle"]),
    warmup=st.sampled_from([0, 0.3, 1, 5.5]),
    noise=st.sampled_from([None, (0.2,), (0.1, 0.6)]),
    ts=st.lists(st.integers(0, TOTAL + 30), min_size=2, max_size=6),
)
def test_rate_depends_on_nothing_but_the_update(kind, warmup, noise, ts):
    noise = None if kind in ("onecycle", "constant") else noise
    options = dict(sched=kind, warmup_epochs=warmup, lr_noise=noise, decay_milestones=(3,))
    walked = schedule(**options)
    rates = [walked.rate(t) for t in range(TOTAL + 31)]
    jumping = schedule(**options)
    assert [jumping.rate(t) for t in ts] == [rates[t] for t in ts]
    assert all(0 < rate <= LR * 1.67 for rate in rates)


def test_noise_stays_in_its_range_and_follows_the_seed():
    quiet = schedule(sched="step", warmup_epochs=0)
    noisy = schedule(sched="step", warmup_epochs=0, lr_noise=(0.25, 0.5), lr_noise_pct=0.1, seed=1)
    other = schedule(sched="step", warmup_epochs=0, lr_noise=(0.25, 0.5), lr_noise_pct=0.1, seed=99)
    ratios = [noisy.rate(t) / quiet.rate(t) for t in range(TOTAL)]
    assert all(r == 1 for r in ratios[:50] + ratios[100:])
    inside = ratios[50:100]
    assert all(0.9 < r < 1.1 and r != 1 for r in inside)
    assert max(inside) > 1.05 and min(inside) < 0.95
    assert [other.rate(t) for t in range(50, 100)] != [noisy.rate(t) for t in range(50, 100)]


def test_apply_sets_every_group_by_its_scale_and_the_factor():
    model = tiny_vit()
    options = OptimOptions(layer_decay=0.5, head_lr_scale=3)
    optimizer = build_optimizer(model, options, lr=LR)
    ours = schedule()
    ours.factor = 0.25
    ours.apply(optimizer, 77)
    assert ours.last == pytest.approx(cosine(77) / 4)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.head.weight)] == pytest.approx(3 * ours.last)
    assert rates[id(model.blocks[2].norm1.weight)] == pytest.approx(ours.last / 2)
    assert rates[id(model.blocks[1].attn.qkv.weight)] == pytest.approx(ours.last / 4)


def test_plateau_decays_after_patience_and_keeps_its_state():
    options = dict(sched="plateau", patience_epochs=1, decay_rate=0.1, warmup_epochs=0, min_lr=2e-3)
    ours = schedule(**options)
    rates = []
    for metric in (50.0, 60.0, 59.0, 58.0, 57.0, 56.0, 61.0):
        rates.append(ours.rate(0))
        ours.end_epoch(metric)
        ours.end_epoch(None)
        again = schedule(**options)
        again.load_state_dict(json.loads(json.dumps(ours.state_dict())))
        ours = again
    assert rates == pytest.approx([LR, LR, LR, LR, LR / 10, LR / 10, 2e-3])


def test_plateau_counts_epochs_that_were_not_measured():
    """Every second epoch is: after the 2nd no progress, which more than 3 epochs without show."""
    ours = schedule(sched="plateau", patience_epochs=3, decay_rate=0.5, warmup_epochs=0)
    rates = []
    for metric in (50.0, 49.0, 49.0):
        ours.end_epoch(metric, 2)
        rates.append(ours.rate(0))
    assert rates == pytest.approx([LR, LR, LR / 2])


def test_plateau_for_losses_and_its_warmup():
    ours = schedule(sched="plateau", patience_epochs=0, lower_is_better=True)
    assert ours.rate(10) == pytest.approx(1e-3 + (LR - 1e-3) / 2)
    for loss in (3.0, 2.0, 1.0):
        ours.end_epoch(loss)
    assert ours.rate(100) == LR
    ours.end_epoch(1.5)
    assert ours.rate(100) == pytest.approx(LR / 10)
    with pytest.raises(OptionError, match="--decay-rate"):
        schedule(sched="plateau", decay_rate=1.0)


def test_plateau_without_a_best_metric_yet_can_be_saved():
    saved = schedule(sched="plateau").state_dict()
    again = schedule(sched="plateau", patience_epochs=0)
    again.load_state_dict(saved)
    again.end_epoch(1.0)
    assert again.rate(TOTAL) == LR
    again.end_epoch(0.5)
    assert again.rate(TOTAL) == pytest.approx(LR / 10)


def test_rollback_factor_is_part_of_the_state():
    ours = schedule()
    ours.factor *= 0.5
    again = schedule()
    again.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    again.apply(optimizer, 100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine(100) / 2)


@pytest.mark.parametrize("name", ["min_lr", "warmup_lr"])
def test_bounds_above_the_peak(name):
    with pytest.raises(OptionError, match="--" + name.replace("_", "-")):
        schedule(**{name: 2 * LR}, required={name})
    default = getattr(ScheduleOptions(), name)
    low = build_schedule(ScheduleOptions(), lr=default / 2, epochs=10, updates_per_epoch=1)
    assert getattr(low.span, name) == 0
    assert max(low.rate(t) for t in range(11)) == pytest.approx(default / 2, rel=0.5)


TIMMS = {
    "cosine": lambda slot, shared: scheduler.CosineLRScheduler(slot, TOTAL, lr_min=1e-4, **shared),
    "poly": lambda slot, shared: scheduler.PolyLRScheduler(
        slot, TOTAL, power=0.9, lr_min=1e-4, **shared
    ),
    "step": lambda slot, shared: scheduler.StepLRScheduler(slot, 70, decay_rate=0.5, **shared),
    # timm decays one update before the milestone it is given.
    "multistep": lambda slot, shared: scheduler.MultiStepLRScheduler(
        slot, [51, 96], decay_rate=0.5, **shared
    ),
    "cosine-restarts": lambda slot, shared: scheduler.CosineLRScheduler(
        slot, 30, lr_min=1e-4, cycle_mul=1.5, cycle_decay=0.8, cycle_limit=TOTAL, **shared
    ),
}


@pytest.mark.parametrize("noise", [None, (0.05, 0.6)])
@pytest.mark.parametrize("kind", TIMMS)
def test_rates_are_timms_to_the_last_digit(kind, noise):
    ours = schedule(
        sched=kind,
        poly_power=0.9,
        decay_epochs=7,
        decay_rate=0.5,
        decay_milestones=(9.5, 5),
        restart_epochs=3,
        restart_mul=1.5,
        restart_decay=0.8,
        lr_noise=noise,
        seed=3,
    )
    shared = {"warmup_t": 20, "warmup_lr_init": 1e-3, "warmup_prefix": False, "t_in_epochs": False}
    if noise:
        shared |= {"noise_range_t": (10.0, 120.0), "noise_pct": 0.67, "noise_seed": 3}
    slot = torch.optim.SGD([torch.zeros(1)], lr=LR)
    theirs = TIMMS[kind](slot, shared)
    for t in range(TOTAL):
        theirs.step_update(t)
        assert ours.rate(t) == slot.param_groups[0]["lr"], t


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_plateau_equals_torchs(lower_is_better):
    options = {"patience_epochs": 2, "decay_rate": 0.3, "warmup_epochs": 0, "min_lr": 1e-3}
    ours = schedule(sched="plateau", lower_is_better=lower_is_better, **options)
    slot = torch.optim.SGD([torch.zeros(1)], lr=LR)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        slot, "min" if lower_is_better else "max", factor=0.3, patience=2, min_lr=1e-3
    )
    metrics = (1 + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0))).tolist()
    rates = set()
    for metric in [*metrics, math.nan, 1.00001 * max(metrics), 0.99999 * min(metrics)]:
        ours.end_epoch(metric)
        theirs.step(metric)
        rates.add(ours.rate(0))
        assert ours.rate(0) == slot.param_groups[0]["lr"]
    assert min(rates) == 1e-3 and len(rates) > 3
