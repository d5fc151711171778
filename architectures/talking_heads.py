"""Talking-heads attention, computed in one of three ways that give the same result.

"Talking-Heads Attention" (Shazeer et al. 2020, arXiv:2003.02436): the heads are mixed linearly
before and after the softmax. Written down plainly that makes five tensors (B, heads, N, N), most
of them kept for the backward pass. ``choose_path`` picks one of

- ``plain``: that formula, with autograd. Attention dropout, export and second derivatives need
  it.
- ``lean``: keeps q, k and v alone and computes the rest anew in the backward pass, a few images
  at a time in buffers that are used again. Any device with PyTorch's own operations, any dtype.
- ``fused``: Triton kernels in which no (N, N) tensor leaves the chip (``talking_heads_triton``).

``set_path`` forces one (``--talking-heads``).
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import OptionError

AttentionPath = Literal["plain", "lean", "fused"]
Choice = Literal["auto", "plain", "lean", "fused"]

# What the kernels are tested with: heads, and the width of a head at most.
FUSED_HEADS = (4, 6, 8, 16)
FUSED_WIDTH = 64
# Compute capabilities whose shared memory is known to suffice: A100, H100 and H200. Smaller GPUs of
# the same generations have 99 KiB instead of 163 or 227.
FUSED_CAPABILITIES = ((8, 0), (9, 0))
# Bytes of each of the lean path's buffers. On a CPU they should stay in a core's cache; on a GPU
# they should be large enough to fill it.
BUFFER_BYTES = {"cpu": 2**21, "cuda": 2**26}

HAS_TRITON = importlib.util.find_spec("triton") is not None
_requested: Choice = "auto"


def set_path(choice: Choice) -> None:
    """Use one path from now on, everywhere in this process; ``auto`` is what it starts with.

    Raises OptionError for another word. That a path is impossible shows when it is used.
    """
    global _requested
    if choice not in get_args(Choice):
        raise OptionError(
            "talking_heads", f"{choice!r} is none of {', '.join(get_args(Choice))}: use one of them"
        )
    _requested = choice


def choose_path(q: Tensor, dropout_p: float = 0.0) -> AttentionPath:
    """How attention is computed for queries like ``q`` (B, heads, N, d).

    On CUDA fused where that is possible, else lean; on a CPU lean, which is the faster one too; on
    other devices plain. Raises OptionError if the requested path is impossible, and why.
    """
    if exporting() or q.device.type == "meta":
        return "plain"
    if _requested != "auto":
        refusal = None if _requested == "plain" else _refusal(_requested, q, dropout_p)
        if refusal:
            raise OptionError(
                "talking_heads", f"{_requested} {refusal}: leave it out to have what is possible"
            )
        return _requested
    if q.device.type == "cuda" and _refusal("fused", q, dropout_p) is None:
        return "fused"
    if q.device.type in BUFFER_BYTES and _refusal("lean", q, dropout_p) is None:
        return "lean"
    return "plain"


def exporting() -> bool:
    """Whether a graph is recorded for others, who know PyTorch's own operators alone."""
    # Not is_exporting(): up to torch 2.11 that is true inside torch.compile as well.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def _refusal(path: AttentionPath, q: Tensor, dropout_p: float) -> str | None:
    """Why ``path``, lean or fused, can't do with ``q``; None if it can."""
    if dropout_p > 0:
        return f"has no attention dropout (rate {dropout_p})"
    if path == "lean":
        return None
    if not HAS_TRITON:
        return "needs Triton, which is not installed"
    heads, _, width = q.shape[1:]
    if heads not in FUSED_HEADS:
        return f"is for {', '.join(map(str, FUSED_HEADS))} heads, not {heads}"
    if width > FUSED_WIDTH:
        return f"is for heads of at most {FUSED_WIDTH} channels, not {width}"
    if q.device.type != "cuda":
        return None if _interpreted() else f"needs a CUDA device, not {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs half precision (--amp), not {str(q.dtype).removeprefix('torch.')}"
    properties = torch.cuda.get_device_properties(q.device)
    if (properties.major, properties.minor) not in FUSED_CAPABILITIES:
        return f"is for the A100, H100 and H200, not for {properties.name}"
    return None


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_pre: Tensor,
    b_pre: Tensor,
    w_post: Tensor,
    b_post: Tensor,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention with talking heads, (B, heads, N, d) -> (B, heads, N, d).

    ``w_pre`` and ``b_pre`` (heads, heads) and (heads,) mix the scores, ``w_post`` and ``b_post``
    the softmax weights (whose rows then needn't sum to one). ``scale`` multiplies the products of
    queries and keys; ``dropout_p`` is the share of mixed weights that are dropped: 0 in evaluation.
    """
    if torch.jit.is_scripting():  # TorchScript compiles this branch alone
        return _plain(q, k, v, w_pre, b_pre, w_post, b_post, scale, dropout_p)
    else:
        path = choose_path(q, dropout_p)
        if path == "plain":
            return _plain(q, k, v, w_pre, b_pre, w_post, b_post, scale, dropout_p)
        if path == "lean":
            return _lean(q, k, v, w_pre, b_pre, w_post, b_post, scale)
        return _fused(q, k, v, w_pre, b_pre, w_post, b_post, scale)[0]


# --- plain --------------------------------------------------------------------------------------


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_pre: Tensor,
    b_pre: Tensor,
    w_post: Tensor,
    b_post: Tensor,
    scale: float,
    dropout_p: float,
) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)  # (B, heads, N, N)
    weights = _mix_heads(_mix_heads(scores, w_pre, b_pre).softmax(dim=-1), w_post, b_post)
    return F.dropout(weights, dropout_p) @ v


def _mix_heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear over the heads of (B, heads, N, N): one matrix product, nothing is permuted."""
    weight = weight.to(x.dtype).expand(x.shape[0], -1, -1)  # (B, heads, heads)
    return torch.baddbmm(bias.to(x.dtype).view(1, -1, 1), weight, x.flatten(2)).view_as(x)


# --- lean ---------------------------------------------------------------------------------------
#
# Custom operators, so that torch.compile takes them as they are: it would unroll the loops over
# slices, and its fusions would keep what these free.


def _slices(q: Tensor) -> Iterator[slice]:
    """The images of ``q``, as many at a time as a buffer holds, at least one."""
    batch, heads, n, _ = q.shape
    step = max(BUFFER_BYTES.get(q.device.type, 0) // (heads * n * n * q.element_size()), 1)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _token_major(x: Tensor) -> Tensor:
    """A new tensor like ``x`` (B, heads, N, d) that lies in memory as (B, N, heads, d): the linear
    layers around attention are over (heads, d) and then needn't copy."""
    batch, heads, n, width = x.shape
    return x.new_empty(batch, n, heads, width).transpose(1, 2)


def _buffers(q: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` buffers (slice · heads, N, N), for all slices: allocating anew costs a CPU more
    than the arithmetic."""
    _, heads, n, _ = q.shape
    first = next(_slices(q), slice(0))
    return q.new_empty(count, (first.stop - first.start) * heads, n, n).unbind()


def _mix(weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """(heads, heads) times the heads of (images · heads, N, N)."""
    heads = len(weight)
    images = len(x) // heads
    into = (images, heads, -1)
    torch.bmm(weight.expand(images, -1, -1), x.view(into), out=out.view(into))
    return out


def _outer(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """Sums over images and pairs of each head of ``x`` with each of ``y``: (heads, heads)."""
    x, y = (z.view(-1, heads, z[0].numel()) for z in (x, y))
    return torch.bmm(x, y.transpose(1, 2)).sum(0)


def _softmax_weights(
    q: Tensor, k: Tensor, w_pre: Tensor, scores: Tensor, out: Tensor, spare: Tensor
) -> Tensor:
    """Weights before the second mixing in ``out``, products of queries and keys in ``scores``.

    The first bias adds the same to all keys of a row: the softmax cancels it.
    """
    torch.bmm(q, k.transpose(1, 2), out=scores)
    return torch.softmax(_mix(w_pre, scores, spare), dim=-1, out=out)


def _post_mix(w_post: Tensor, b_post: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    _mix(w_post, weights, out).view(-1, len(b_post), *out.shape[1:]).add_(b_post.view(-1, 1, 1))
    return out


@torch.library.custom_op("talking_heads::lean", mutates_args=())
def _lean(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_pre: Tensor,
    b_pre: Tensor,
    w_post: Tensor,
    b_post: Tensor,
    scale: float,
) -> Tensor:
    w_pre, w_post, b_post = w_pre.to(q) * scale, w_post.to(q), b_post.to(q)
    out = _token_major(q)
    buffers = _buffers(q, 2)
    with torch.autocast(q.device.type, enabled=False):
        for part in _slices(q):
            qs, ks, vs = (x[part].flatten(0, 1) for x in (q, k, v))
            a, b = (x[: len(qs)] for x in buffers)
            # The scores aren't needed again: their buffer takes the weights.
            weights = _softmax_weights(qs, ks, w_pre, a, a, b)
            mixed = _post_mix(w_post, b_post, weights, b)
            out[part] = (mixed @ vs).view(-1, *q.shape[1:])
    return out


@torch.library.custom_op("talking_heads::lean_backward", mutates_args=())
def _lean_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_pre: Tensor,
    w_post: Tensor,
    b_post: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = q.shape[1]
    pre, post, shift = w_pre.to(q) * scale, w_post.to(q), b_post.to(q)
    pre_t, post_t = pre.t().contiguous(), post.t().contiguous()
    dq, dk, dv = _token_major(q), _token_major(k), _token_major(v)
    dw_pre, dw_post, db_post = (torch.zeros_like(x) for x in (w_pre, w_post, b_post))
    buffers = _buffers(q, 4)
    with torch.autocast(q.device.type, enabled=False):
        for part in _slices(q):
            qs, ks, vs, g = (x[part].flatten(0, 1) for x in (q, k, v, grad))
            scores, weights, a, b = (x[: len(qs)] for x in buffers)
            _softmax_weights(qs, ks, pre, scores, weights, a)
            mixed = _post_mix(post, shift, weights, a)
            dv[part] = (mixed.transpose(1, 2) @ g).view(-1, *q.shape[1:])
            dmixed = torch.bmm(g, vs.transpose(1, 2), out=a)
            dw_post += _outer(dmixed, weights, heads)
            dweights = _mix(post_t, dmixed, b)
            dlogits = torch._softmax_backward_data(dweights, weights, -1, q.dtype, grad_input=a)
            dw_pre += _outer(dlogits, scores, heads) * scale
            dscores = _mix(pre_t, dlogits, b)
            dq[part] = (dscores @ ks).view(-1, *q.shape[1:])
            dk[part] = (dscores.transpose(1, 2) @ qs).view(-1, *q.shape[1:])
            # The bias weighs every key of a row alike, so the sums of both suffice.
            sums = g.sum(1, dtype=db_post.dtype) * vs.sum(1, dtype=db_post.dtype)
            db_post += sums.view(-1, heads, q.shape[-1]).sum((0, 2))
    return dq, dk, dv, dw_pre, dw_post, db_post


@_lean.register_fake
def _(q, k, v, w_pre, b_pre, w_post, b_post, scale):
    return _token_major(q)


@_lean_backward.register_fake
def _(grad, q, k, v, w_pre, w_post, b_post, scale):
    return _gradients_like(q, k, v, w_pre, w_post, b_post)


def _gradients_like(q, k, v, w_pre, w_post, b_post):
    mixing = (torch.empty_like(x) for x in (w_pre, w_post, b_post))
    return _token_major(q), _token_major(k), _token_major(v), *mixing


def _keep(ctx, inputs, output) -> None:
    q, k, v, w_pre, _, w_post, b_post, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, w_pre, w_post, b_post)


def _differentiate_lean(ctx, grad):
    dq, dk, dv, dw_pre, dw_post, db_post = _lean_backward(grad, *ctx.saved_tensors, ctx.scale)
    # The first bias has a gradient, zero, because DDP and optimisers wait for one.
    return dq, dk, dv, dw_pre, torch.zeros_like(db_post), dw_post, db_post, None


_lean.register_autograd(_differentiate_lean, setup_context=_keep)


# --- fused --------------------------------------------------------------------------------------


@torch.library.custom_op("talking_heads::fused", mutates_args=())
def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_pre: Tensor,
    b_pre: Tensor,
    w_post: Tensor,
    b_post: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from architectures import talking_heads_triton as kernels  # needs Triton

    return kernels.forward(q, k, v, w_pre, w_post, b_post, scale)


@torch.library.custom_op("talking_heads::fused_backward", mutates_args=())
def _fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_pre: Tensor,
    w_post: Tensor,
    b_post: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from architectures import talking_heads_triton as kernels

    return kernels.backward(grad, q, k, v, w_pre, w_post, b_post, lse, scale)


@_fused.register_fake
def _(q, k, v, w_pre, b_pre, w_post, b_post, scale):
    return _token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_fused_backward.register_fake
def _(grad, q, k, v, w_pre, w_post, b_post, lse, scale):
    return _gradients_like(q, k, v, w_pre, w_post, b_post)


def _keep_fused(ctx, inputs, output) -> None:
    q, k, v, w_pre, _, w_post, b_post, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, w_pre, w_post, b_post, output[1])


def _differentiate_fused(ctx, grad, _):
    dq, dk, dv, dw_pre, dw_post, db_post = _fused_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, dw_pre, torch.zeros_like(db_post), dw_post, db_post, None


_fused.register_autograd(_differentiate_fused, setup_context=_keep_fused)
