"""The three paths of talking-heads attention against the formula in float64.

Without CUDA the Triton kernels run in Triton's interpreter (see conftest.py), on the CPU.
"""

import importlib

import pytest
import torch
from torch import nn

import config
import models
from architectures import talking_heads
from architectures.talking_heads import (
    BUFFER_BYTES,
    choose_path,
    set_path,
    talking_heads_attention,
)
from cait_models import Attention_talking_head
from errors import OptionError
from training.build import choose_talking_heads

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
NAMES = ("q", "k", "v", "w_pre", "b_pre", "w_post", "b_post")

# Largest error as a share of the largest value. fp32 rounds at 6e-8 and sums some hundred numbers.
# Half precision rounds what is stored and what is multiplied, at 5e-4 and 4e-3.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _automatic():
    yield
    set_path("auto")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Skips what the interpreter of an older Triton (torch 2.11's) can't do with NumPy 2.4."""
    kernels = importlib.import_module("architectures.talking_heads_triton")

    def guarded(launch):
        def run(*arguments, **keywords):
            try:
                return launch(*arguments, **keywords)
            except Exception as error:
                if "only 0-dimensional arrays can be converted" in str(error):
                    pytest.skip("Triton's interpreter doesn't know this NumPy")
                raise

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, guarded(getattr(kernels, name)))


def inputs(batch, heads, n, width, dtype=torch.float32, device="cpu"):
    """q, k, v as CaiT has them, views of one (B, N, 3, heads, d) tensor, and the mixing."""
    qkv = torch.randn(batch, n, 3, heads, width, device=device).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    w_pre, w_post = torch.randn(2, heads, heads, device=device) / heads**0.5
    b_pre, b_post = torch.randn(2, heads, device=device)
    mixing = (w_pre, b_pre, w_post, b_post)
    if dtype == torch.float64:
        mixing = tuple(x.double() for x in mixing)
    return tuple(x.detach().requires_grad_() for x in (q, k, v, *mixing))


def formula(q, k, v, w_pre, b_pre, w_post, b_post, scale):
    """Equations 1 to 8 of the paper."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
    scores = torch.einsum("gh,bhnm->bgnm", w_pre, scores) + b_pre[:, None, None]
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    weights = torch.einsum("gh,bhnm->bgnm", w_post, weights) + b_post[:, None, None]
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def check(path, values, tolerance, scale=0.3):
    """Output and gradients of ``path`` are those of the formula in float64."""
    exact = tuple(x.detach().double().requires_grad_() for x in values)
    expected = formula(*exact, scale)
    direction = torch.randn_like(values[0]).transpose(1, 2).contiguous().transpose(1, 2)
    set_path(path)
    result = talking_heads_attention(*values, scale)
    assert result.dtype == values[0].dtype
    gradients = torch.autograd.grad(result, values, direction)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    pairs = [("output", result, expected), *zip(NAMES, gradients, expected_gradients, strict=True)]
    for name, value, true in pairs:
        # The softmax cancels the first bias: its gradient is zero but for rounding.
        size = 1.0 if name == "b_pre" else true.abs().max().item()
        error = (value.double() - true).abs().max().item() / size
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("path", ["plain", "lean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [1, 4, 6])
def test_plain_and_lean_are_the_formula(path, dtype, heads):
    check(path, inputs(3, heads, 17, 5, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("images", [1, 2, 5, 100])
def test_lean_doesnt_depend_on_the_slices(images, monkeypatch):
    values = inputs(5, 4, 7, 3, torch.float64)
    monkeypatch.setitem(BUFFER_BYTES, "cpu", images * 4 * 7 * 7 * 8)
    check("lean", values, TOLERANCE[torch.float64])


def test_lean_passes_gradcheck(monkeypatch):
    monkeypatch.setitem(BUFFER_BYTES, "cpu", 2 * 2 * 4 * 4 * 8)
    set_path("lean")
    values = inputs(3, 2, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: talking_heads_attention(*x, 0.5), values)


# One key block and less, whole blocks, a block that is nearly empty, more programs than one.
@pytest.mark.parametrize(
    ("heads", "n", "width"),
    [(4, 5, 12), (4, 65, 48), (6, 33, 16), (8, 32, 24), (8, 49, 48), (16, 17, 20), (16, 31, 64)],
)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.skipif(DEVICE == "cuda", reason="no fp32")),
        torch.float16,
        torch.bfloat16,
    ],
)
def test_fused_is_the_formula(heads, n, width, dtype):
    check("fused", inputs(2, heads, n, width, dtype, DEVICE), TOLERANCE[dtype])


@pytest.mark.parametrize(("n", "heads"), [(196, 8), (197, 4)])
def test_fused_at_the_sizes_of_cait(n, heads):
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    check("fused", inputs(1, heads, n, 16, dtype, DEVICE), TOLERANCE[dtype])


def test_fused_takes_rows_that_are_not_contiguous():
    values = list(inputs(1, 4, 9, 16, torch.float16, DEVICE))
    for i in range(3):
        values[i] = values[i].detach().transpose(2, 3).contiguous().transpose(2, 3)
        values[i].requires_grad_()
        assert values[i].stride(-1) != 1
    check("fused", tuple(values), TOLERANCE[torch.float16])


def test_large_logits_do_not_overflow():
    values = inputs(1, 4, 20, 8, torch.float16, DEVICE)
    for path in ("lean", "fused"):
        set_path(path)
        result = talking_heads_attention(*values, 200.0)
        assert result.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(result.sum(), values))


@pytest.mark.parametrize(("heads", "n"), [(4, 20), (8, 20), (16, 20)])
def test_low_logits_leave_nothing_infinite(heads, n):
    """exp(0 - logsumexp), for the places beyond the last key, is too large for any dtype."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v, w_pre, *rest = inputs(1, heads, n, 16, dtype, DEVICE)
    with torch.no_grad():
        q.abs_()
        k.abs_().neg_()
        w_pre.copy_(10 * torch.eye(heads))
    # Logits of -300 round at 2e-5, or in half precision at 1.
    values = (q, k, v, w_pre, *rest)
    check("fused", values, 1e-3 if dtype == torch.float32 else 2.0, scale=3.0)


def test_frozen_mixing_gets_no_gradient():
    values = inputs(1, 4, 6, 3)
    frozen = [x.detach() for x in values[3:]]
    set_path("lean")
    talking_heads_attention(*values[:3], *frozen, 0.5).sum().backward()
    assert all(x.grad is not None for x in values[:3])
    assert all(x.grad is None for x in frozen)


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["plain", "lean", "fused"])
def test_bytes_kept_for_the_backward_pass(path):
    batch, heads, n, width = 2, 4, 40, 4
    dtype = torch.float16
    values = inputs(batch, heads, n, width, dtype, DEVICE)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    set_path(path)
    with (
        torch.autocast(DEVICE, dtype),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        talking_heads_attention(*values, 0.5)
    pairs = batch * heads * n * n * dtype.itemsize
    rows = batch * heads * n * (3 * width * dtype.itemsize + 4)  # q, k, v and the log-sum-exp
    mixing = 2 * (heads + 1) * heads * 4
    if path == "plain":
        assert sum(kept.values()) > 3 * pairs
    else:
        assert sum(kept.values()) <= rows + mixing < pairs


# --- choosing -----------------------------------------------------------------------------------


def test_choice_on_a_cpu():
    q = torch.zeros(2, 4, 9, 48)
    assert choose_path(q) == "lean"
    assert choose_path(q.double()) == "lean"
    assert choose_path(q, dropout_p=0.1) == "plain"
    assert choose_path(q.to("meta")) == "plain"
    for path in ("plain", "lean"):
        set_path(path)
        assert choose_path(q) == path


def test_dropout_is_for_the_plain_path_alone():
    values = inputs(1, 4, 6, 3)
    set_path("lean")
    talking_heads_attention(*values, 0.5, 0.0)
    with pytest.raises(OptionError, match="--talking-heads: lean has no attention dropout"):
        talking_heads_attention(*values, 0.5, 0.1)


def test_dropout_drops_weights():
    q = torch.zeros(1, 1, 400, 2)
    mixing = (torch.ones(1, 1), torch.zeros(1))
    result = talking_heads_attention(q, q, torch.ones_like(q), *mixing, *mixing, 1.0, 0.5)
    assert result.mean().item() == pytest.approx(1, abs=0.02)  # kept weights are scaled up
    assert result.std() > 0.01


class Cuda:
    """Stands for a CUDA tensor where there is none."""

    device = torch.device("cuda", 0)

    def __init__(self, heads=8, width=48, dtype=torch.bfloat16):
        self.shape, self.dtype = (2, heads, 196, width), dtype


@pytest.fixture
def gpu(monkeypatch):
    class Properties:
        major, minor, name = 9, 0, "NVIDIA H100"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return Properties


@pytest.mark.parametrize(
    ("arguments", "dropout_p", "why"),
    [
        ({}, 0.1, "no attention dropout"),
        ({"heads": 5}, 0.0, "for 4, 6, 8, 16 heads, not 5"),
        ({"width": 80}, 0.0, "at most 64 channels, not 80"),
        ({"dtype": torch.float32}, 0.0, "half precision .--amp., not float32"),
    ],
)
def test_what_the_kernels_cant_do_takes_another_path(gpu, arguments, dropout_p, why):
    assert choose_path(Cuda()) == "fused"
    q = Cuda(**arguments)
    assert choose_path(q, dropout_p) == ("plain" if dropout_p else "lean")
    set_path("fused")
    with pytest.raises(OptionError, match=why):
        choose_path(q, dropout_p)


def test_gpus_the_kernels_arent_sized_for(gpu):
    gpu.major, gpu.minor, gpu.name = 8, 6, "RTX A4000"
    assert choose_path(Cuda()) == "lean"
    set_path("fused")
    with pytest.raises(OptionError, match="not for RTX A4000"):
        choose_path(Cuda())


def test_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(talking_heads, "HAS_TRITON", False)
    assert choose_path(Cuda()) == "lean"
    set_path("fused")
    with pytest.raises(OptionError, match="needs Triton"):
        choose_path(Cuda())


def test_fused_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    set_path("fused")
    with pytest.raises(OptionError, match="needs a CUDA device, not cpu"):
        choose_path(torch.zeros(2, 4, 9, 48))


def test_unknown_path():
    with pytest.raises(OptionError, match="'fast' is none of auto, plain, lean, fused"):
        set_path("fast")


def test_option():
    argv = ["--data-set", "DIGITS", "--talking-heads"]
    options = config.load([*argv, "lean"]).model
    cait = models.build_model("cait_xxs24_224", 2, input_size=32)
    choose_talking_heads(cait, options.talking_heads)
    q = torch.zeros(2, 4, 9, 48)
    with pytest.raises(OptionError, match="lean has no attention dropout"):
        choose_path(q, dropout_p=0.1)
    with pytest.raises(OptionError, match="--talking-heads: the model has no talking heads"):
        choose_talking_heads(nn.Linear(1, 1), "lean")
    choose_talking_heads(nn.Linear(1, 1), "auto")
    assert choose_path(q, dropout_p=0.1) == "plain"
    for contradiction in (["--amp", "off"], ["--rollback-fp32-steps", "5"]):
        with pytest.raises(OptionError, match="fused is for half precision"):
            config.load([*argv, "fused", "--on-nonfinite", "rollback", *contradiction])


# --- with the rest of PyTorch -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["plain", "lean", "fused"])
def test_compiled_is_the_same(path):
    values = inputs(2, 4, 9, 8, torch.float16 if path == "fused" else torch.float32, DEVICE)
    set_path(path)

    def attend(*x):
        return talking_heads_attention(*x, 0.5)

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected, result = attend(*values), compiled(*values)
    # The compiler of another version may order sums in its own way.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6)
    for x, y in zip(
        torch.autograd.grad(result.sum(), values),
        torch.autograd.grad(expected.sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("operator", "dtype"), [("lean", torch.float32), ("fused", torch.float16)])
def test_operators_describe_themselves_truly(operator, dtype):
    values = inputs(2, 4, 9, 8, dtype, DEVICE)
    function = getattr(torch.ops.talking_heads, operator).default
    torch.library.opcheck(function, (*values, 0.5))


def test_exported_models_hold_pytorchs_operators_alone():
    layer = Attention_talking_head(16, num_heads=4).eval()
    program = torch.export.export(layer, (torch.zeros(2, 5, 16),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in targets if "talking_heads" in name]
    assert any("softmax" in name for name in targets)
    traced = torch.jit.trace(layer, torch.zeros(2, 5, 16))
    assert "talking_heads::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("path", ["lean", "fused"])
def test_under_autocast_it_is_as_exact_as_the_plain_path(path):
    layer = Attention_talking_head(32, num_heads=4).to(DEVICE)
    nn.init.normal_(layer.qkv.weight)
    x = torch.randn(2, 9, 32, device=DEVICE)

    def run(choice, half):
        set_path(choice)
        layer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        return {"output": y.detach()} | {n: p.grad for n, p in layer.named_parameters()}

    exact, plain, other = run("plain", False), run("plain", True), run(path, True)
    for name in exact.keys() - {"proj_l.bias"}:  # that is zero but for rounding
        # Both round in other places; of the few numbers of a bias either may be the luckier.
        allowed = 3 * (plain[name] - exact[name]).norm()
        assert 0 < (other[name] - exact[name]).norm() < allowed, name


# --- on the device ------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("plain", torch.float32),
        ("lean", torch.float16),
        ("lean", torch.bfloat16),
        ("fused", torch.float16),
        ("fused", torch.bfloat16),
    ],
)
def test_on_the_device_it_is_the_formula(path, dtype):
    check(path, inputs(4, 8, 196, 48, dtype, "cuda"), TOLERANCE[dtype])


@needs_cuda
@pytest.mark.parametrize("path", ["lean", "fused"])
def test_runs_repeat_bit_for_bit_on_the_device(path):
    values = inputs(4, 8, 196, 48, torch.bfloat16, "cuda")
    set_path(path)
    first, second = (
        torch.autograd.grad(talking_heads_attention(*values, 0.3).square().sum(), values)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
