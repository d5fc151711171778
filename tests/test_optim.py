"""Learning rates against closed formulas, parameter groups against timm, freezing, clipping."""

import json
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import optim
from config import OptimOptions, ScheduleOptions
from errors import OptionError

UPDATES = 10
EPOCHS = 20
TOTAL = UPDATES * EPOCHS
LR = 0.1


def tiny_vit(distilled: bool = False) -> nn.Module:
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    return timm.create_model(name, img_size=32, depth=3, embed_dim=12, num_heads=2, num_classes=5)


# --- scaled learning rate -------------------------------------------------------------------------


def test_learning_rate_follows_the_effective_batch():
    assert optim.scaled_lr(5e-4, 1024) == pytest.approx(1e-3)
    assert optim.scaled_lr(5e-4, 64) == pytest.approx(6.25e-5)
    assert optim.scaled_lr(5e-4, 1024, unscale=True) == 5e-4


# --- parameter groups -----------------------------------------------------------------------------


def by_parameter(groups) -> dict[int, tuple[float, float]]:
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group.get("lr_scale", 1.0), group["weight_decay"])
    return found


@pytest.mark.parametrize("distilled", [False, True])
def test_weight_decay_groups_equal_timms(distilled):
    model = tiny_vit(distilled)
    ours = by_parameter(optim.parameter_groups(model, weight_decay=0.05))
    exempt = model.no_weight_decay()
    theirs = by_parameter(param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt))
    assert ours == theirs
    names = {id(p): n for n, p in model.named_parameters()}
    undecayed = {names[i] for i, (_, decay) in ours.items() if decay == 0}
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= undecayed
    assert "head.weight" not in undecayed and "blocks.0.attn.qkv.weight" not in undecayed


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_layer_decay_groups_equal_timms(decay):
    model = tiny_vit()
    ours = by_parameter(optim.parameter_groups(model, weight_decay=0.05, layer_decay=decay))
    theirs = by_parameter(
        param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay
        )
    )
    assert ours.keys() == theirs.keys()
    for key, pair in ours.items():
        assert pair == pytest.approx(theirs[key])


def test_layer_decay_counts_layers_from_the_head():
    model = tiny_vit()
    scales = by_parameter(optim.parameter_groups(model, weight_decay=0, layer_decay=0.5))
    assert scales[id(model.head.weight)][0] == 1
    assert scales[id(model.blocks[2].attn.qkv.weight)][0] == 0.5
    assert scales[id(model.blocks[0].attn.qkv.weight)][0] == 0.125
    assert scales[id(model.patch_embed.proj.weight)][0] == 0.0625


@pytest.mark.parametrize("distilled", [False, True])
def test_head_scale_multiplies_layer_decay_of_all_heads(distilled):
    model = tiny_vit(distilled)
    groups = optim.parameter_groups(model, weight_decay=0.05, layer_decay=0.5, head_lr_scale=10)
    scales = by_parameter(groups)
    heads = [model.head, model.head_dist] if distilled else [model.head]
    plain = by_parameter(optim.parameter_groups(model, weight_decay=0.05, layer_decay=0.5))
    in_heads = {id(p) for head in heads for p in head.parameters()}
    assert len(in_heads) == 2 * len(heads)
    for key, (scale, decay) in scales.items():
        assert scale == plain[key][0] * (10 if key in in_heads else 1)
        assert decay == plain[key][1]


def test_fixed_parameters_are_grouped_too():
    model = tiny_vit().requires_grad_(False)
    everything = {id(p) for p in model.parameters()}
    for decay in (None, 0.7):
        groups = optim.parameter_groups(model, weight_decay=0.1, layer_decay=decay)
        assert set(by_parameter(groups)) == everything


def test_options_that_the_model_cannot_honour_raise():
    model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="--layer-decay"):
        optim.parameter_groups(model, weight_decay=0, layer_decay=0.5)
    with pytest.raises(OptionError, match="--head-lr-scale"):
        optim.parameter_groups(model, weight_decay=0, head_lr_scale=2)


# --- optimiser ------------------------------------------------------------------------------------


def test_unknown_optimiser_names_the_nearest():
    with pytest.raises(OptionError, match=r"--opt: unknown optimiser 'admw'.*adamw"):
        optim.build_optimizer(nn.Linear(2, 2), OptimOptions(opt="admw"), lr=0.1)


def test_second_order_optimiser_is_refused():
    with pytest.raises(OptionError, match="--opt.*second derivatives"):
        optim.build_optimizer(nn.Linear(2, 2), OptimOptions(opt="adahessian"), lr=0.1)


def test_optimiser_of_a_missing_package_is_refused():
    if torch.cuda.is_available():
        pytest.skip("apex may be installed here")
    with pytest.raises(OptionError, match="--opt: fusedlamb can't be used here"):
        optim.build_optimizer(nn.Linear(2, 2), OptimOptions(opt="fusedlamb"), lr=0.1)


def test_arguments_reach_the_optimiser():
    model = nn.Linear(2, 2)
    options = OptimOptions(opt="adamw", opt_eps=1e-6, opt_betas=(0.8, 0.9), weight_decay=0.3)
    optimizer = optim.build_optimizer(model, options, lr=0.7)
    assert type(optimizer) is torch.optim.AdamW
    decays = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {1: 0.0, 2: 0.3}
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"], group["lr"]) == (1e-6, (0.8, 0.9), 0.7)
    sgd = optim.build_optimizer(model, OptimOptions(opt="sgd", momentum=0.5), lr=0.1)
    assert {g["momentum"] for g in sgd.param_groups} == {0.5}


def test_argument_the_optimiser_does_not_take():
    model = nn.Linear(2, 2)
    asked = OptimOptions(opt="adamw", momentum=0.5)
    with pytest.raises(OptionError, match="--momentum: --opt adamw takes none"):
        optim.build_optimizer(model, asked, lr=0.1, required={"momentum"})
    optim.build_optimizer(model, asked, lr=0.1)
    with pytest.raises(OptionError, match="--opt-eps"):
        lion = OptimOptions(opt="lion", opt_eps=1e-3)
        optim.build_optimizer(model, lion, lr=0.1, required={"opt_eps"})
    with pytest.raises(OptionError, match="--opt-betas.*2 values, got 1"):
        optim.build_optimizer(model, OptimOptions(opt_betas=(0.9,)), lr=0.1)
    with pytest.raises(OptionError, match="--opt: sgd refuses"):
        optim.build_optimizer(model, OptimOptions(opt="sgd", momentum=0.0), lr=0.1)


@pytest.mark.filterwarnings("ignore:It is highly recommended")
@pytest.mark.parametrize(
    "name", [n for n in list_optimizers() if not n.startswith(("bnb", "fused", "adahessian"))]
)
def test_every_optimiser_takes_a_step(name):
    model = nn.Linear(3, 2)
    optimizer = optim.build_optimizer(model, OptimOptions(opt=name), lr=0.01)
    before = model.weight.detach().clone()
    # ADOPT only looks at its first gradient.
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)


def test_lookahead_wraps_another():
    optimizer = optim.build_optimizer(nn.Linear(2, 2), OptimOptions(opt="lookahead_adamw"), lr=0.1)
    assert type(optimizer).__name__ == "Lookahead"
    assert not optim.optimizer_supports_found_inf(optimizer)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum"])
def test_found_inf_leaves_out_the_step(name):
    """Weights, state and everything after are as if the step had never been."""
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    skipping = optim.build_optimizer(one, OptimOptions(opt=name), lr=0.1)
    plain = optim.build_optimizer(two, OptimOptions(opt=name), lr=0.1)
    assert optim.optimizer_supports_found_inf(skipping)

    def step(model, optimizer, value, found_inf=0.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        del optimizer.found_inf

    step(one, skipping, math.nan, 1.0)
    for value in (1.0, -3.0):
        step(one, skipping, value)
        step(one, skipping, math.inf, 1.0)
        step(two, plain, value)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        for key, value in plain.state[theirs].items():
            assert torch.equal(skipping.state[ours][key], value), key


def test_only_fused_kernels_of_torch_support_found_inf():
    model = nn.Linear(2, 2)
    lamb = optim.build_optimizer(model, OptimOptions(opt="lamb"), lr=0.1)
    assert not optim.optimizer_supports_found_inf(lamb)
    assert not optim.optimizer_supports_found_inf(torch.optim.AdamW(model.parameters()))


def test_fused_sgd_equals_plain_sgd():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    ours = optim.build_optimizer(one, OptimOptions(opt="sgd", weight_decay=0.0), lr=0.1)
    plain = torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=False)
    for _ in range(3):
        x = torch.randn(4, 3)
        for model, optimizer in ((one, ours), (two, plain)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(one.weight, two.weight)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_parameter_unfrozen_later_is_optimised(name):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = optim.build_optimizer(model, OptimOptions(opt=name), lr=0.1)
    freezer = optim.Freezer(model, ["0"], ["1:0"])
    start = model[0].weight.detach().clone()
    for epoch in range(2):
        freezer.apply(epoch)
        assert torch.equal(model[0].weight, start)
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, start)


# --- schedule -------------------------------------------------------------------------------------


def schedule(**options) -> optim.Schedule:
    extra = {k: options.pop(k) for k in ("lower_is_better", "seed", "required") if k in options}
    options = {"warmup_epochs": 2, "warmup_lr": 1e-3, "min_lr": 1e-4} | options
    return optim.Schedule(
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
    optimizer = optim.build_optimizer(model, options, lr=LR)
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
    low = optim.Schedule(ScheduleOptions(), lr=default / 2, epochs=10, updates_per_epoch=1)
    assert getattr(low, name) == 0
    assert max(low.rate(t) for t in range(11)) == pytest.approx(default / 2, rel=0.5)


# --- freezing -------------------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezer_is_a_function_of_the_epoch():
    model = tiny_vit()
    everything = trained(model)
    freezer = optim.Freezer(model, ["*"], ["0:head", "2:blocks.2.*", "4:blocks.*"])
    assert freezer.apply(0) is True
    assert trained(model) == {"head.weight", "head.bias"}
    assert freezer.apply(1) is False
    assert freezer.apply(5) is True
    late = trained(model)
    assert late == {n for n in everything if n.startswith(("blocks.", "head."))}
    freezer.apply(2)
    assert trained(model) == {n for n in everything if n.startswith(("blocks.2.", "head."))}


@pytest.mark.parametrize("pattern", ["blocks.1", "blocks.1.*", "blocks.1."])
def test_freeze_patterns_name_modules_or_globs(pattern):
    model = tiny_vit()
    everything = trained(model)
    optim.Freezer(model, [pattern]).apply(0)
    assert everything - trained(model) == {n for n in everything if n.startswith("blocks.1.")}


def test_freezing_drops_gradients_and_respects_what_the_model_fixes():
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optim.Freezer(model, ["patch_embed"], ["3:patch_embed"]).apply(0)
    assert model.patch_embed.proj.weight.grad is None
    assert model.head.weight.grad is not None
    assert "pos_embed" not in trained(model)


def test_bad_freezing_raises():
    model = tiny_vit()
    with pytest.raises(OptionError, match=r"--freeze: 'block\.1' matches no parameter.*blocks\.1"):
        optim.Freezer(model, ["block.1"])
    with pytest.raises(OptionError, match="--unfreeze-at: 'head' matches no frozen parameter"):
        optim.Freezer(model, ["blocks"], ["3:head"])
    with pytest.raises(OptionError, match="--freeze: leaves nothing"):
        optim.Freezer(model, ["*"], ["1:head"])


@pytest.mark.parametrize("distilled", [False, True])
def test_attention_only(distilled):
    model = tiny_vit(distilled)
    everything = trained(model)
    optim.Freezer(model, attn_only=True).apply(0)
    heads = ("head.", "head_dist.")
    assert trained(model) == {
        n for n in everything if ".attn." in n or n.startswith(heads) or n == "pos_embed"
    }
    assert "blocks.0.norm1.weight" in everything - trained(model)
    with pytest.raises(OptionError, match="--attn-only"):
        optim.Freezer(nn.Linear(2, 2), attn_only=True)


def test_frozen_norms_are_those_with_statistics_and_no_trained_parameter():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Linear(2, 2))
    model.append(nn.BatchNorm2d(2, affine=False))
    assert optim.frozen_norms(model) == []
    optim.Freezer(model, ["0", "1.weight", "2"]).apply(0)
    assert optim.frozen_norms(model) == [model[0]]


# --- gradients ------------------------------------------------------------------------------------


def with_gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.full((2, 2), 3.0)
    parameters[1].grad = torch.tensor([-4.0, 0.0])
    return [*parameters, nn.Parameter(torch.ones(3))]


NORM = math.sqrt(4 * 9 + 16)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_norm_before_clipping_is_returned_in_every_mode(mode):
    assert optim.clip_gradients(with_gradients(), None, mode).item() == pytest.approx(NORM)
    assert optim.clip_gradients(iter(with_gradients()), 0.1, mode).item() == pytest.approx(NORM)
    assert optim.clip_gradients([nn.Parameter(torch.ones(1))], 0.1, mode).item() == 0


def test_no_limit_leaves_gradients_alone():
    parameters = with_gradients()
    optim.clip_gradients(parameters, None)
    assert torch.equal(parameters[0].grad, torch.full((2, 2), 3.0))


def test_clip_by_norm():
    parameters = with_gradients()
    optim.clip_gradients(parameters, 1.3, "norm")
    torch.testing.assert_close(parameters[0].grad, torch.full((2, 2), 3.0 * 1.3 / NORM))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-4.0 * 1.3 / NORM, 0.0]))


def test_clip_by_value():
    parameters = with_gradients()
    optim.clip_gradients(parameters, 3.5, "value")
    torch.testing.assert_close(parameters[0].grad, torch.full((2, 2), 3.0))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-3.5, 0.0]))


def test_adaptive_clipping_limits_each_unit_by_its_weight():
    parameters = with_gradients()
    optim.clip_gradients(parameters, 0.1, "agc")
    # Rows: weight norm √8, gradient norm √18. The vector is one unit: √2 and 4.
    row = 3.0 * 0.1 * math.sqrt(8) / math.sqrt(18)
    torch.testing.assert_close(parameters[0].grad, torch.full((2, 2), row))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-0.1 * math.sqrt(2), 0.0]))
    spared = with_gradients()
    optim.clip_gradients(spared, 0.1, "agc", spared=spared[:1])
    torch.testing.assert_close(spared[0].grad, torch.full((2, 2), 3.0))
    torch.testing.assert_close(spared[1].grad, torch.tensor([-0.1 * math.sqrt(2), 0.0]))
