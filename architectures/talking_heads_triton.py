"""Talking-heads attention in Triton: forward and backward without a (B, H, N, N) tensor in memory.

Imported only where Triton is there (``talking_heads.py`` decides). With TRITON_INTERPRET=1, set
before Triton is first imported, the same kernels run on the CPU; that is how they are tested.

Heads are mixed, so a program needs a (query, key) pair in all heads at once. A tile is therefore
(lanes, queries, keys) with always 16 lanes: the heads, padded to a power of two, times as many
neighbouring blocks as fit. 8 heads make 2 blocks side by side, 4 heads make 4. 16 is the least
inner size of the tensor cores; padding 8 heads to 16 instead would compute twice as much. Mixing
is then one (pairs, 16) x (16, 16) product with a block-diagonal matrix. Pairs come first because
the softmax weights then leave one mixing product in the very registers in which the next one
wants its left operand.

Why there are two passes over the keys: the heads are mixed after the softmax, so a row's weights
must be normalised before they meet the values. Flash attention's trick of dividing at the end
would need one accumulator for each pair of heads. The first pass finds the log-sum-exp of each
row and head, the second computes the logits anew. For the same reason the backward pass can't take
the softmax's row sums from gradient x output: they are summed in a pass of their own.

The bias before the softmax is missing: it adds the same to all keys of a row, so the softmax
cancels it and its gradient is zero.

Nothing is added atomically. Gradients of queries come from programs that own queries, those of
keys and values from programs that own keys, those of the mixing weights as one partial sum a
program, added up afterwards. Runs repeat bit for bit.

Budget on an H100 (sm_90), 8 heads of width 48 padded to 64, half precision, tiles of 16 x 16. "By
count" is the arithmetic, "compiled" what ``ptxas`` makes of it (test_talking_heads_triton.py
compiles them and checks the shared memory). There are 65536 registers and 227 KiB of shared memory.

- A tile is 16 lanes x 16 x 16 = 4096 numbers: in fp32, 16 registers for each of 256 threads.
- An accumulator of outputs or gradients is 16 lanes x 16 x 64 = 16384 numbers: 64 registers.
- An operand of that shape is 32 KiB in half precision: in shared memory, or 32 registers.
- Forward: by count 1 accumulator, the queries and about 5 tiles, 64 + 32 + 80 = 176 of 256 threads.
  Compiled for 512 threads, half of that plus addresses: 120, nothing spilled, 105 KiB.
- Queries: 1 accumulator, 2 operands, 2 partial sums (16 x 16 x 16) and about 4 tiles,
  64 + 64 + 32 + 64 = 224. Compiled for 256 threads: 255, 40 bytes spilled, 145 KiB.
- Keys: 2 accumulators, 2 operands and about 3 tiles, 128 + 64 + 48 = 240. Compiled for 256 threads:
  255, 128 bytes spilled, 147 KiB.

One program fills a multiprocessor. In fp32 the operands would be twice as large, 300 to 430 KiB in
all: there is no fp32 on CUDA, only in the interpreter, where tests want its precision.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 16
BLOCK = 16
# (num_warps, num_stages). More warps hide more latency; 16 leave a thread 128 registers, enough for
# the forward kernel alone. Fixed rather than tuned when first used: a run's arithmetic must repeat.
FORWARD = (16, 2)
BACKWARD = (8, 2)

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _load(
    base,
    stride_head,
    stride_row,
    head,
    rows,
    heads,
    n,
    dim,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """(LANES, BLOCK, DIM) of a (heads, n, dim) tensor, zero where there is nothing."""
    d = tl.arange(0, DIM)[None, None, :]
    rows = tl.broadcast_to(rows, (LANES, BLOCK))[:, :, None]
    head = head[:, None, None]
    mask = (head < heads) & (rows < n) & (d < dim)
    return tl.load(base + head * stride_head + rows * stride_row + d, mask, 0.0).to(OPERAND)


@triton.jit
def _store(base, stride_head, stride_row, head, rows, heads, n, dim, x, DIM: tl.constexpr):
    d = tl.arange(0, DIM)[None, None, :]
    rows = rows[:, :, None]
    head = head[:, None, None]
    mask = (head < heads) & (rows < n) & (d < dim)
    tl.store(base + head * stride_head + rows * stride_row + d, x.to(base.dtype.element_ty), mask)


@triton.jit
def _mixing(base, heads, HEADS: tl.constexpr, LANES: tl.constexpr, OPERAND: tl.constexpr):
    """(lane out, lane in): the (heads, heads) matrix for each block of lanes, zero between them."""
    out = tl.arange(0, LANES)[:, None]
    into = tl.arange(0, LANES)[None, :]
    g, h = out % HEADS, into % HEADS
    mask = (out // HEADS == into // HEADS) & (g < heads) & (h < heads)
    return tl.load(base + g * heads + h, mask, 0.0).to(OPERAND)


@triton.jit
def _products(x, y):
    """Products of rows, (LANES, X, D) and (LANES, Y, D) -> pairs (X, Y, LANES)."""
    return tl.permute(tl.dot(x, tl.permute(y, (0, 2, 1))), (1, 2, 0))


@triton.jit
def _mix(x, weight, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Pairs (BLOCK, BLOCK, lane in) times (lane in, lane out)."""
    x = tl.reshape(x.to(weight.dtype), (BLOCK * BLOCK, LANES))
    mixed = tl.dot(x, weight)
    return tl.reshape(mixed, (BLOCK, BLOCK, LANES))


@triton.jit
def _outer(x, y, OPERAND: tl.constexpr):
    """For each row of pairs the sum over keys of lane x lane: (BLOCK, LANES, LANES).

    Rows are added up by the caller at its very end: until then each warp keeps its own.
    """
    return tl.dot(tl.permute(x.to(OPERAND), (0, 2, 1)), y.to(OPERAND))


@triton.jit
def _by_lane(x, OPERAND: tl.constexpr):
    """Pairs (X, Y, LANES) -> (LANES, X, Y), the left operand of a product with rows."""
    return tl.permute(x.to(OPERAND), (2, 0, 1))


@triton.jit
def _place(n, HEADS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image, the head of each lane and the rows (LANES, BLOCK) it owns."""
    lane = tl.arange(0, LANES)
    blocks = tl.cdiv(n, BLOCK * (LANES // HEADS))
    program = tl.program_id(0)
    first = (program % blocks) * (LANES // HEADS) + lane // HEADS
    rows = first[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # 64 bits: a large batch has more than 2^31 numbers.
    return (program // blocks).to(tl.int64), lane % HEADS, rows


@triton.jit
def forward_kernel(
    q, k, v, pre, post, bias, out, lse,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    scale, heads, n, dim,
    HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Owns queries. Writes the output and the log-sum-exp (B, heads, n) of the mixed logits."""
    batch, head, rows = _place(n, HEADS, LANES, BLOCK)
    pre_t = tl.trans(_mixing(pre, heads, HEADS, LANES, OPERAND))
    post_t = tl.trans(_mixing(post, heads, HEADS, LANES, OPERAND))
    shift = tl.load(bias + head, head < heads, 0.0).to(tl.float32)[None, None, :]
    q = _load(q + batch * qb, qh, qn, head, rows, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
    k += batch * kb
    v += batch * vb
    step = tl.arange(0, BLOCK)[None, :]

    high = tl.full((BLOCK, LANES), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK, LANES), tl.float32)
    for start in range(0, n, BLOCK):
        y = _load(k, kh, kn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        logits = _mix(_products(q, y) * scale, pre_t, BLOCK, LANES)
        inside = start + tl.arange(0, BLOCK)[None, :, None] < n
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(high, tl.max(logits, 1))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(logits - higher[:, None, :]), 1)
        high = higher
    norm = high + tl.log(total)

    result = tl.zeros((LANES, BLOCK, DIM), tl.float32)
    for start in range(0, n, BLOCK):
        y = _load(k, kh, kn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        logits = _mix(_products(q, y) * scale, pre_t, BLOCK, LANES)
        inside = start + tl.arange(0, BLOCK)[None, :, None] < n
        weights = tl.where(inside, tl.exp(logits - norm[:, None, :]), 0.0)
        # Keys beyond the last get the bias too, but their values are zero. Without the mask they
        # could be infinite, and infinity times zero is not zero.
        weights = _mix(weights, post_t, BLOCK, LANES) + shift
        y = _load(v, vh, vn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        result = tl.dot(_by_lane(weights, OPERAND), y, result)

    _store(out + batch * ob, oh, on, head, rows, heads, n, dim, result, DIM)
    pairs = tl.trans(rows)
    lse += (batch * heads + head[None, :]) * n + pairs
    tl.store(lse, norm, (head[None, :] < heads) & (pairs < n))


@triton.jit
def queries_kernel(
    q, k, v, grad, pre, post, lse, delta, dq, dpre, dpost,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on,
    scale, heads, n, dim,
    HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Owns queries. Writes their gradient, the row sums ``delta`` of the softmax's backward pass
    (B, heads, n) and this program's part of the weights' gradients (LANES, LANES)."""
    batch, head, rows = _place(n, HEADS, LANES, BLOCK)
    w_pre = _mixing(pre, heads, HEADS, LANES, OPERAND)
    w_post = _mixing(post, heads, HEADS, LANES, OPERAND)
    pre_t = tl.trans(w_pre)
    q = _load(q + batch * qb, qh, qn, head, rows, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
    g = _load(grad + batch * gb, gh, gn, head, rows, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
    k += batch * kb
    v += batch * vb
    step = tl.arange(0, BLOCK)[None, :]
    pairs = tl.trans(rows)
    owned = (head[None, :] < heads) & (pairs < n)
    place = (batch * heads + head[None, :]) * n + pairs
    norm = tl.load(lse + place, owned, 0.0)[:, None, :]

    sums = tl.zeros((BLOCK, LANES), tl.float32)
    for start in range(0, n, BLOCK):
        y = _load(k, kh, kn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        logits = _mix(_products(q, y) * scale, pre_t, BLOCK, LANES)
        inside = start + tl.arange(0, BLOCK)[None, :, None] < n
        weights = tl.where(inside, tl.exp(logits - norm), 0.0)
        y = _load(v, vh, vn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        dweights = _mix(_products(g, y), w_post, BLOCK, LANES)
        sums += tl.sum(weights * dweights, 1)
    tl.store(delta + place, sums, owned)

    result = tl.zeros((LANES, BLOCK, DIM), tl.float32)
    pre_sum = tl.zeros((BLOCK, LANES, LANES), tl.float32)
    post_sum = tl.zeros((BLOCK, LANES, LANES), tl.float32)
    for start in range(0, n, BLOCK):
        y = _load(v, vh, vn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        dmixed = _products(g, y)
        dweights = _mix(dmixed, w_post, BLOCK, LANES)
        y = _load(k, kh, kn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        scores = _products(q, y) * scale
        logits = _mix(scores, pre_t, BLOCK, LANES)
        inside = start + tl.arange(0, BLOCK)[None, :, None] < n
        weights = tl.where(inside, tl.exp(logits - norm), 0.0)
        dlogits = weights * (dweights - sums[:, None, :])
        post_sum += _outer(dmixed, weights, OPERAND)
        pre_sum += _outer(dlogits, scores, OPERAND)
        dscores = _mix(dlogits, w_pre, BLOCK, LANES)
        result = tl.dot(_by_lane(dscores, OPERAND), y, result)

    _store(dq + batch * ob, oh, on, head, rows, heads, n, dim, result * scale, DIM)
    lane = tl.arange(0, LANES)
    part = tl.program_id(0) * LANES * LANES + lane[:, None] * LANES + lane[None, :]
    tl.store(dpre + part, tl.sum(pre_sum, 0))
    tl.store(dpost + part, tl.sum(post_sum, 0))


@triton.jit
def keys_kernel(
    q, k, v, grad, pre, post, bias, lse, delta, dk, dv,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, ob, oh, on,
    scale, heads, n, dim,
    HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Owns keys and values: writes their gradients. Pairs are (key, query) here, so that they are
    the left operand of the products as they come."""
    batch, head, rows = _place(n, HEADS, LANES, BLOCK)
    w_pre = _mixing(pre, heads, HEADS, LANES, OPERAND)
    w_post = _mixing(post, heads, HEADS, LANES, OPERAND)
    pre_t = tl.trans(w_pre)
    post_t = tl.trans(w_post)
    shift = tl.load(bias + head, head < heads, 0.0).to(tl.float32)[None, None, :]
    k = _load(k + batch * kb, kh, kn, head, rows, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
    v = _load(v + batch * vb, vh, vn, head, rows, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
    q += batch * qb
    grad += batch * gb
    step = tl.arange(0, BLOCK)[None, :]

    inside = tl.trans(rows)[:, None, :] < n
    key_sum = tl.zeros((LANES, BLOCK, DIM), tl.float32)
    value_sum = tl.zeros((LANES, BLOCK, DIM), tl.float32)
    for start in range(0, n, BLOCK):
        # Queries beyond the last have a gradient of zero, whatever their weights are.
        queries = start + tl.arange(0, BLOCK)[:, None]
        owned = (head[None, :] < heads) & (queries < n)
        place = (batch * heads + head[None, :]) * n + queries
        norm = tl.load(lse + place, owned, 0.0)[None, :, :]
        sums = tl.load(delta + place, owned, 0.0)[None, :, :]
        x = _load(q, qh, qn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        g = _load(grad, gh, gn, head, start + step, heads, n, dim, LANES, BLOCK, DIM, OPERAND)
        logits = _mix(_products(k, x) * scale, pre_t, BLOCK, LANES)
        # A key beyond the last would be infinite where all logits are low, and mixing multiplies it
        # by zero for the lanes of its neighbour.
        weights = tl.where(inside, tl.exp(logits - norm), 0.0)
        mixed = _mix(weights, post_t, BLOCK, LANES) + shift
        value_sum = tl.dot(_by_lane(mixed, OPERAND), g, value_sum)
        dweights = _mix(_products(v, g), w_post, BLOCK, LANES)
        dlogits = weights * (dweights - sums)
        dscores = _mix(dlogits, w_pre, BLOCK, LANES)
        key_sum = tl.dot(_by_lane(dscores, OPERAND), x, key_sum)

    _store(dk + batch * ob, oh, on, head, rows, heads, n, dim, key_sum * scale, DIM)
    _store(dv + batch * ob, oh, on, head, rows, heads, n, dim, value_sum, DIM)


# --- launching ----------------------------------------------------------------------------------


def _constants(q: Tensor, launch: tuple[int, int]) -> dict[str, Any]:
    heads, width = q.shape[1], q.shape[3]
    operand = _OPERANDS[q.dtype]
    if triton.knobs.runtime.interpret and operand is tl.bfloat16:
        operand = tl.float32  # NumPy, which the interpreter computes with, has no bfloat16
    return {
        "HEADS": triton.next_power_of_2(heads),
        "DIM": max(triton.next_power_of_2(width), 16),
        "LANES": LANES,
        "BLOCK": BLOCK,
        "OPERAND": operand,
        "num_warps": launch[0],
        "num_stages": launch[1],
    }


def _programs(q: Tensor) -> int:
    """One for each image and group of blocks."""
    batch, heads, n, _ = q.shape
    return batch * triton.cdiv(n, BLOCK * (LANES // triton.next_power_of_2(heads)))


def _token_major(x: Tensor) -> Tensor:
    """A new (B, heads, n, dim) tensor that lies in memory as (B, n, heads, dim): what follows and
    what came before are linear layers over (heads, dim), which then needn't copy."""
    batch, heads, n, dim = x.shape
    return x.new_empty(batch, n, heads, dim).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """``x`` with the numbers of a row next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, w_pre: Tensor, w_post: Tensor, b_post: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, heads, n, dim) output, and the (B, heads, n) log-sum-exp that ``backward`` takes."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = _token_major(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever it is given
        forward_kernel[(_programs(q),)](
            q,
            k,
            v,
            w_pre.contiguous(),
            w_post.contiguous(),
            b_post.contiguous(),
            out,
            lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            scale,
            *q.shape[1:],
            **_constants(q, FORWARD),
        )
    return out, lse


def backward(
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
    """Gradients of q, k, v, w_pre, w_post and b_post, those of the mixing in their own dtype."""
    grad, q, k, v = _rows(grad), _rows(q), _rows(k), _rows(v)
    w_pre, w_post = w_pre.contiguous(), w_post.contiguous()
    dq, dk, dv = _token_major(q), _token_major(q), _token_major(q)
    delta = torch.empty_like(lse)
    programs, constants = _programs(q), _constants(q, BACKWARD)
    parts = lse.new_empty(2, programs, LANES, LANES)
    strides = [s for x in (q, k, v, grad, dq) for s in x.stride()[:3]]
    sizes = (scale, *q.shape[1:])
    with torch.cuda.device_of(q):
        queries_kernel[(programs,)](
            q,
            k,
            v,
            grad,
            w_pre,
            w_post,
            lse,
            delta,
            dq,
            parts[0],
            parts[1],
            *strides,
            *sizes,
            **constants,
        )
        keys_kernel[(programs,)](
            q,
            k,
            v,
            grad,
            w_pre,
            w_post,
            b_post.contiguous(),
            lse,
            delta,
            dk,
            dv,
            *strides,
            *sizes,
            **constants,
        )
    dw_pre, dw_post = (_diagonal_blocks(part.sum(0), q.shape[1]) for part in parts)
    # The bias gives every key of a row the same weight, so its gradient is that of the sums.
    sums = grad.sum(2, dtype=torch.float32) * v.sum(2, dtype=torch.float32)
    return dq, dk, dv, dw_pre.to(w_pre), dw_post.to(w_post), sums.sum((0, 2)).to(b_post)


def _diagonal_blocks(x: Tensor, heads: int) -> Tensor:
    """(LANES, LANES) -> (heads, heads): the blocks on the diagonal, added up."""
    padded = triton.next_power_of_2(heads)
    groups = LANES // padded
    blocks = torch.einsum("gogi->oi", x.view(groups, padded, groups, padded))
    return blocks[:heads, :heads].contiguous()
