"""Attention of a model on one image, layer by layer and head by head."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

from cait_models import Attention_talking_head, Class_Attention
from errors import OptionError, UserError
from models import Attention

SELF_ATTENTION = (Attention, TimmAttention)


def attention_map(model: nn.Module, images: Tensor, *, last: bool = False) -> Tensor:
    """Attention from the answer to the patches of one image (1, C, H, W): (rows, columns).

    Rollout (arXiv:2005.00928) multiplies the layers' attention, half of each being the identity for
    the residual connection. In CaiT only the class-attention layers are followed, as in its paper.
    """
    layers = attention_layers(model)
    if not layers:
        raise UserError(_without_attention(model))
    with torch.no_grad(), recorded(layers) as weights:
        model(images)
    averages = [layer.mean(1)[0] for layer in weights]  # heads
    if isinstance(layers[0], Class_Attention):
        averages = [_with_silent_patches(row) for row in averages]
        prefix = 1
    else:
        prefix = model.num_prefix_tokens
    flow = averages[-1] if last else rollout(averages)
    asked = flow[_read_by_heads(model, prefix)].mean(0)[prefix:]
    return asked.unflatten(0, _grid(model, images, len(asked)))


def layer_map(model: nn.Module, images: Tensor, layer: int, head: int | None = None) -> Tensor:
    """Attention of one layer to the patches of one image (1, C, H, W): (rows, columns).

    What the tokens that the answer is made of look at; in CaiT's layers before class attention,
    which have patches alone, the mean over these. There a head is what the mixing behind the
    softmax makes of all (arXiv:2003.02436), and may be below 0.

    Args:
        layer: counted from 0, in the order of computation; CaiT's class attention comes last.
        head: counted from 0, None for the mean of all.

    Raises OptionError for a layer or head that there isn't, UserError for a model without any.
    """
    layers = all_layers(model)
    if not layers:
        raise UserError(_without_attention(model))
    _check_number("layer", layer, len(layers))
    asked = layers[layer]
    if head is not None:
        _check_number("head", head, asked.num_heads)
    with torch.no_grad(), recorded([asked]) as weights:
        model(images)
    heads = weights[0][0]  # (heads, queries, N)
    attention = heads.mean(0) if head is None else heads[head]
    if isinstance(asked, Attention_talking_head):
        queries, prefix = slice(None), 0
    elif isinstance(asked, Class_Attention):
        queries, prefix = slice(0, 1), 1
    else:
        prefix = model.num_prefix_tokens
        queries = _read_by_heads(model, prefix)
    row = attention[queries].mean(0)[prefix:]
    return row.unflatten(0, _grid(model, images, len(row)))


def _check_number(option: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise OptionError(option, f"{number} is none of 0 to {count - 1}, which this model has")


def _without_attention(model: nn.Module) -> str:
    return f"{type(model).__name__} has no attention that can be followed: --method grad-cam"


def all_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer whose attention can be shown, in the order of computation."""
    kinds: tuple[type[nn.Module], ...] = (Attention_talking_head, Class_Attention)
    if hasattr(model, "num_prefix_tokens"):
        kinds += SELF_ATTENTION
    return [m for m in model.modules() if isinstance(m, kinds)]


def _read_by_heads(model: nn.Module, prefix: int) -> slice:
    """The tokens that the answer is made of: class and distillation, or the patches' mean."""
    if getattr(model, "global_pool", "token") != "token":
        return slice(prefix, None)
    return slice(0, 2 if hasattr(model, "head_dist") else 1)


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """(N, N) attention of each layer, heads averaged, to that of the last on the first's input."""
    identity = torch.eye(len(layers[0]), dtype=layers[0].dtype, device=layers[0].device)
    flow = identity
    for attention in layers:
        mixed = (attention + identity) / 2
        flow = mixed / mixed.sum(-1, keepdim=True) @ flow
    return flow


def _with_silent_patches(row: Tensor) -> Tensor:
    """(1, N) class attention as (N, N): in these layers the patches stay what they are."""
    square = torch.eye(row.shape[1], dtype=row.dtype, device=row.device)
    square[:1] = row
    return square


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The layers between the patches and the answer, in order; class attention where there is."""
    layers = [m for m in model.modules() if isinstance(m, Class_Attention)]
    if layers or not hasattr(model, "num_prefix_tokens"):
        return layers
    return [m for m in model.modules() if isinstance(m, SELF_ATTENTION)]


def _grid(model: nn.Module, images: Tensor, count: int) -> tuple[int, int]:
    """Rows and columns of ``count`` patches of ``images`` (B, C, H, W)."""
    embed = getattr(model, "patch_embed", None)
    grids = [getattr(embed, "grid_size", None)]
    if (patch := getattr(embed, "patch_size", None)) is not None:
        # A model that takes any size knows the grid of one of them.
        patch = (patch, patch) if isinstance(patch, int) else patch
        grids.insert(0, (images.shape[-2] // patch[0], images.shape[-1] // patch[1]))
    for grid in grids:
        if grid is not None and grid[0] * grid[1] == count:
            return grid[0], grid[1]
    raise UserError(f"{count} tokens of {type(model).__name__} are no grid of patches")


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets each layer's attention, (B, heads, queries, N), as the model runs.

    The fused attention keeps its weights to itself: they are computed again from its input.
    """
    weights: list[Tensor] = []
    caller = threading.get_ident()

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # A server's other threads may be using the same model.
        if threading.get_ident() == caller:
            weights.append(_attention(layer, inputs[0]))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _attention(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, N, D) tokens to (B, heads, queries, N) weights, as the layer computes them."""
    if isinstance(layer, Class_Attention):
        q, k = (
            y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
            for y in (layer.q(x[:, :1]), layer.k(x))
        )
    else:
        qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(layer, TimmAttention):
        q, k = layer.q_norm(q), layer.k_norm(k)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if isinstance(layer, Attention_talking_head):
        shares = layer.proj_l(scores.movedim(1, -1)).softmax(dim=-2)  # (B, queries, N, heads)
        return layer.proj_w(shares).movedim(-1, 1)
    return scores.softmax(dim=-1)
