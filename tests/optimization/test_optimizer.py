"""The optimiser: its arguments, steps that are left out, and parameters that join later."""

import copy
import math

import pytest
import torch
from optimizer_names import CLASSES, PLAIN
from torch import nn

from config import OptimOptions
from errors import OptionError
from optimization.freezing import Freezer
from optimization.optimizer import build_optimizer, optimizer_supports_found_inf, scaled_lr


def test_learning_rate_follows_the_effective_batch():
    assert scaled_lr(5e-4, 1024) == pytest.approx(1e-3)
    assert scaled_lr(5e-4, 64) == pytest.approx(6.25e-5)
    assert scaled_lr(5e-4, 1024, unscale=True) == 5e-4


def test_unknown_optimiser_names_the_nearest():
    with pytest.raises(OptionError, match=r"--opt: unknown optimiser 'admw'.*adamw"):
        build_optimizer(nn.Linear(2, 2), OptimOptions(opt="admw"), lr=0.1)


def test_second_order_optimiser_is_refused():
    with pytest.raises(
        OptionError, match="--opt: adahessian needs second derivatives.*: use adamw"
    ):
        build_optimizer(nn.Linear(2, 2), OptimOptions(opt="adahessian"), lr=0.1)


def test_optimiser_of_a_missing_package_is_refused():
    if torch.cuda.is_available():
        pytest.skip("apex may be installed here")
    with pytest.raises(OptionError, match="--opt: fusednovograd can't be used.*; novograd needs"):
        build_optimizer(nn.Linear(2, 2), OptimOptions(opt="fusednovograd"), lr=0.1)


def test_further_arguments_reach_the_optimiser():
    """A step of RMSprop by hand, centred by the mean of the gradients."""
    layer = nn.Linear(1, 1, bias=False)
    start = layer.weight.item()
    options = OptimOptions(
        opt="rmsprop", momentum=0.0, weight_decay=0.0, opt_kwargs=("alpha=0.5", "centered=true")
    )
    optimizer = build_optimizer(layer, options, lr=0.1)
    layer.weight.grad = torch.full_like(layer.weight, 3.0)
    optimizer.step()
    square, mean = 0.5 * 3.0**2, 0.5 * 3.0
    step = 0.1 * 3.0 / (math.sqrt(square - mean**2) + optimizer.param_groups[0]["eps"])
    assert layer.weight.item() == pytest.approx(start - step, rel=1e-5)
    with pytest.raises(OptionError, match="--opt-kwargs: --opt rmsprop takes no 'centred': did"):
        build_optimizer(layer, OptimOptions(opt="rmsprop", opt_kwargs=("centred=true",)), lr=0.1)


FUSED = ["lamb", "adam", "adamw", "sgd", "momentum", "lookahead_lamb"]


@pytest.mark.parametrize("plain", FUSED)
def test_names_of_apexs_kernels_stand_for_the_same_update(plain, caplog):
    fused = plain.replace("lookahead_", "lookahead_fused") if "_" in plain else f"fused{plain}"
    ours, same = (
        build_optimizer(nn.Linear(2, 2), OptimOptions(opt=name), lr=0.1) for name in (fused, plain)
    )
    assert type(ours) is type(same)
    for left, right in zip(ours.param_groups, same.param_groups, strict=True):
        assert {k: v for k, v in left.items() if k != "params"} == {
            k: v for k, v in right.items() if k != "params"
        }
    assert [r.getMessage() for r in caplog.records] == [
        f"--opt {fused}: {plain} is used, the same update without apex"
    ]


def fused_lamb(weights, gradients, lr, decays, betas=(0.9, 0.999), eps=1e-8):
    """apex's FusedLAMB (csrc/multi_tensor_lamb.cu): all gradients are divided by the part of their
    common norm above 1; the trust ratio is of the parameters that decay. ``gradients``: per step,
    one for each weight."""
    firsts, seconds = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step, raw in enumerate(gradients, 1):
        norm = torch.cat([g.flatten() for g in raw]).norm()
        for n, (weight, decay) in enumerate(zip(weights, decays, strict=True)):
            gradient = raw[n] / max(1.0, float(norm))
            firsts[n] = betas[0] * firsts[n] + (1 - betas[0]) * gradient
            seconds[n] = betas[1] * seconds[n] + (1 - betas[1]) * gradient**2
            unbiased = firsts[n] / (1 - betas[0] ** step)
            root = (seconds[n] / (1 - betas[1] ** step)).sqrt()
            update = unbiased / (root + eps) + decay * weight
            ratio = weight.norm() / update.norm() if decay else 1.0
            weights[n] = weight - lr * ratio * update
    return weights


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_fused_lamb_is_apexs_update(scale):
    """Where the limit of the gradients' norm acts, and where it doesn't."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3).double()
    start = [p.detach().clone() for p in model.parameters()]
    gradients = [
        [scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in start]
        for _ in range(5)
    ]
    optimizer = build_optimizer(model, OptimOptions(opt="fusedlamb", weight_decay=0.3), lr=0.02)
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    expected = fused_lamb(start, gradients, 0.02, decays=(0.3, 0.0))
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=1e-9)


def test_arguments_reach_the_optimiser():
    model = nn.Linear(2, 2)
    options = OptimOptions(opt="adamw", opt_eps=1e-6, opt_betas=(0.8, 0.9), weight_decay=0.3)
    optimizer = build_optimizer(model, options, lr=0.7)
    assert type(optimizer) is torch.optim.AdamW
    decays = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {1: 0.0, 2: 0.3}
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"], group["lr"]) == (1e-6, (0.8, 0.9), 0.7)
    sgd = build_optimizer(model, OptimOptions(opt="sgd", momentum=0.5), lr=0.1)
    assert {g["momentum"] for g in sgd.param_groups} == {0.5}


def test_argument_the_optimiser_does_not_take():
    model = nn.Linear(2, 2)
    asked = OptimOptions(opt="adamw", momentum=0.5)
    with pytest.raises(OptionError, match="--momentum: --opt adamw takes none"):
        build_optimizer(model, asked, lr=0.1, required={"momentum"})
    build_optimizer(model, asked, lr=0.1)
    with pytest.raises(OptionError, match="--opt-eps"):
        lion = OptimOptions(opt="lion", opt_eps=1e-3)
        build_optimizer(model, lion, lr=0.1, required={"opt_eps"})
    with pytest.raises(OptionError, match="--opt-betas.*2 values, got 1"):
        build_optimizer(model, OptimOptions(opt_betas=(0.9,)), lr=0.1)
    with pytest.raises(OptionError, match="--opt: sgd refuses"):
        build_optimizer(model, OptimOptions(opt="sgd", momentum=0.0), lr=0.1)


@pytest.mark.filterwarnings("ignore:It is highly recommended")
@pytest.mark.parametrize("name", PLAIN)
def test_every_optimiser_takes_a_step(name):
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimOptions(opt=name), lr=0.01)
    before = model.weight.detach().clone()
    # kron compiles its step, which takes a C++ compiler half a minute and changes nothing.
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):  # ADOPT only looks at its first gradient
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)


def test_lookahead_wraps_another():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimOptions(opt="lookahead_adamw"), lr=0.1)
    assert type(optimizer).__name__ == "Lookahead"
    assert not optimizer_supports_found_inf(optimizer)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum"])
def test_found_inf_leaves_out_the_step(name):
    """Weights, state and everything after are as if the step had never been."""
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    skipping = build_optimizer(one, OptimOptions(opt=name), lr=0.1)
    plain = build_optimizer(two, OptimOptions(opt=name), lr=0.1)
    assert optimizer_supports_found_inf(skipping)

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
    lamb = build_optimizer(model, OptimOptions(opt="lamb"), lr=0.1)
    assert not optimizer_supports_found_inf(lamb)
    assert not optimizer_supports_found_inf(torch.optim.AdamW(model.parameters()))


def test_fused_sgd_equals_plain_sgd():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    ours = build_optimizer(one, OptimOptions(opt="sgd", weight_decay=0.0), lr=0.1)
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
    optimizer = build_optimizer(model, OptimOptions(opt=name), lr=0.1)
    freezer = Freezer(model, ["0"], ["1:0"])
    start = model[0].weight.detach().clone()
    for epoch in range(2):
        freezer.apply(epoch)
        assert torch.equal(model[0].weight, start)
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, start)


@pytest.mark.filterwarnings("ignore:It is highly recommended")
@pytest.mark.parametrize("name", sorted(CLASSES - {"kron"}))  # it compiles for minutes
def test_lookahead_around_each_optimiser_takes_what_is_unfrozen_later(name):
    """And goes on from its saved state: two sessions give the weights of one."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    options = OptimOptions(opt=f"lookahead_{name}")
    optimizer = build_optimizer(model, options, lr=0.01)
    freezer = Freezer(model, ["0"], ["4:0"])
    start = model[0].weight.detach().clone()
    x = torch.randn(4, 3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for epoch in range(8):  # the slow weights are updated at the sixth step
        freezer.apply(epoch)
        if epoch <= 4:
            assert torch.equal(model[0].weight, start)
        step(model, optimizer)
    assert not torch.equal(model[0].weight, start)
    again = copy.deepcopy(model)
    resumed = build_optimizer(again, options, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        torch.manual_seed(0)  # some optimisers draw
        step(model, optimizer)
        torch.manual_seed(0)
        step(again, resumed)
    assert torch.equal(again[0].weight, model[0].weight)
