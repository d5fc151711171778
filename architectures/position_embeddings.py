"""Position embeddings of another image size or other tokens, fitted to a model.

A position embedding (1, P, D) has an entry for each patch, row by row, and in front of them one for
each of the tokens that have a position: none, the class token, class and distillation token, or
all of them. Which ones is nowhere written down; it follows from the tokens there are and from P.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.sizes import ImageSize, height_width
from errors import CheckpointError

Size = tuple[int, int]

# In the order of their positions.
TOKENS = ("cls_token", "dist_token", "reg_token")


class Layout(NamedTuple):
    """What the entries of a position embedding belong to."""

    prefix: tuple[tuple[str, int], ...]
    """(token, number among those of its name) of each entry in front of the patches."""
    grid: Size
    """Rows and columns of the patches."""


@dataclass(frozen=True)
class Fitted:
    """A position embedding for another model, and the tokens that changed with it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    """What was done to each, in a few words."""


def fit_positions(
    model: nn.Module, weights: Mapping[str, Tensor], size: ImageSize | None = None
) -> Fitted:
    """What takes the place of ``weights["pos_embed"]`` and of tokens in ``weights`` for ``model``.

    Patches are interpolated to the model's grid. A token whose position the model doesn't have gets
    it added, since that is what the model would have done; one whose position ``weights`` don't
    have gets zeros for it. A token that only the model has keeps the position it has there. Nothing
    is returned where ``weights`` or the model have no position embedding, and for one over
    something else than the patches.

    ``size``: of the images, in pixels, that the weights were trained for, where that is known.

    Raises:
        CheckpointError: which tokens have positions, or the shape of the grid, can't be worked out.
    """
    own, value = model.state_dict().get("pos_embed"), weights.get("pos_embed")
    if own is None or value is None or value.ndim != own.ndim:
        return Fitted()
    if own.ndim == 4:
        return _fit_map(own, value)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or own.ndim != 3 or value.shape[-1] != own.shape[-1]:
        return Fitted()
    ours = _own_layout(model, own.shape[1], (grid[0], grid[1]))
    tokens = _tokens(weights)
    theirs = _known_layout(model, value.shape[1], tokens, size)
    if theirs is None:
        theirs = _layout(value.shape[1], tokens, ours, _tokens(model.state_dict()))
    if theirs == ours:
        return Fitted()
    positions = dict(zip(theirs.prefix, value[:, : len(theirs.prefix)].unbind(1), strict=True))
    new = own.clone()
    for i, token in enumerate(ours.prefix):
        if token in tokens:
            new[:, i] = positions.pop(token, 0)
    patches = value[:, len(theirs.prefix) :]
    new[:, len(ours.prefix) :] = interpolate_grid(patches, theirs.grid, ours.grid)
    fitted = Fitted({"pos_embed": new}, {"pos_embed": _how(theirs, ours)})
    for (name, i), position in positions.items():
        if name in model.state_dict():
            token = fitted.tensors.setdefault(name, weights[name].clone())
            token[:, i] += position
            fitted.how[name] = "with its position"
    return fitted


def _how(theirs: Layout, ours: Layout) -> str:
    parts = []
    if theirs.grid != ours.grid:
        parts.append("{}×{} to {}×{}".format(*theirs.grid, *ours.grid))
    if theirs.prefix != ours.prefix:
        parts.append(f"{len(theirs.prefix)} tokens with a position to {len(ours.prefix)}")
    return ", ".join(parts)


def _tokens(weights: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
    """All tokens in front of the patches, in order, whether they have positions or not."""
    found = [name for name in TOKENS if name in weights and weights[name].ndim == 3]
    return tuple((name, i) for name in found for i in range(weights[name].shape[1]))


def _prefixes(tokens: tuple[tuple[str, int], ...]) -> list[tuple[tuple[str, int], ...]]:
    """The first tokens that can have positions: up to the end of those of one name."""
    ends = [i for i in range(1, len(tokens)) if tokens[i][0] != tokens[i - 1][0]]
    return [tokens[:end] for end in dict.fromkeys((0, *ends, len(tokens)))]


def _own_layout(model: nn.Module, count: int, grid: Size) -> Layout:
    number = count - grid[0] * grid[1]
    for prefix in _prefixes(_tokens(model.state_dict())):
        if len(prefix) == number:
            return Layout(prefix, grid)
    raise CheckpointError(
        f"the model's own has {count} entries for {grid[0]}×{grid[1]} patches: which tokens the "
        "others belong to is unknown"
    )


def _known_layout(
    model: nn.Module, count: int, tokens: tuple[tuple[str, int], ...], size: ImageSize | None
) -> Layout | None:
    """The layout of ``count`` entries for images of ``size``, cut into patches as by ``model``.

    None where it isn't known, or they are others.
    """
    patch = getattr(model.patch_embed, "patch_size", None)
    if size is None or patch is None:
        return None
    patches = patch if isinstance(patch, tuple) else (patch, patch)
    rows, columns = (side // p for side, p in zip(height_width(size), patches, strict=True))
    fitting = [p for p in _prefixes(tokens) if len(p) + rows * columns == count]
    return Layout(fitting[0], (rows, columns)) if fitting else None


def _layout(
    count: int,
    tokens: tuple[tuple[str, int], ...],
    ours: Layout,
    our_tokens: tuple[tuple[str, int], ...],
) -> Layout:
    """The layout of ``count`` entries in front of which are some of the ``tokens``.

    It is ours if there are as many for the same tokens. Else the grid is square or has the shape of
    ours, if that is possible in one way only; of several, one that is square behind our prefix.
    """
    if tokens == our_tokens and count == len(ours.prefix) + ours.grid[0] * ours.grid[1]:
        return ours
    possible = [
        Layout(prefix, grid)
        for prefix in _prefixes(tokens)
        for grid in _grids(count - len(prefix), ours.grid)
    ]
    if len(possible) == 1:
        return possible[0]
    alike = [layout for layout in possible if layout.prefix == ours.prefix]
    if len(alike) == 1 and alike[0].grid[0] == alike[0].grid[1]:
        return alike[0]
    named = " and ".join(dict.fromkeys(name for name, _ in tokens)) or "no token"
    found = " or ".join(f"{len(p)} for tokens and {g[0]}×{g[1]} patches" for p, g in possible)
    raise CheckpointError(
        f"{count} positions beside {named} can be {found}"
        if found
        else f"{count} positions beside {named} are no square of patches, nor of the shape "
        f"{ours.grid[0]}×{ours.grid[1]}"
    )


def _grids(count: int, like: Size) -> list[Size]:
    """Grids of ``count`` patches that are square, or have the shape of ``like``."""
    if count < 1:
        return []
    rows = {round(count**0.5), round((count * like[0] / like[1]) ** 0.5)} - {0}
    grids = [(r, count // r) for r in sorted(rows) if count % r == 0]
    return [(r, c) for r, c in grids if r == c or r * like[1] == c * like[0]]


def _fit_map(own: Tensor, value: Tensor) -> Fitted:
    """Embeddings whose shape tells the grid: (1, D, rows, columns) or (1, rows, columns, D)."""
    if value.shape == own.shape:
        return Fitted()
    if value.shape[:2] == own.shape[:2]:
        new = _interpolate(value, tuple(own.shape[2:]))
        sizes = value.shape[2:], own.shape[2:]
    elif value.shape[3] == own.shape[3]:
        new = _interpolate(value.permute(0, 3, 1, 2), tuple(own.shape[1:3])).permute(0, 2, 3, 1)
        sizes = value.shape[1:3], own.shape[1:3]
    else:
        return Fitted()
    how = "{}×{} to {}×{}".format(*sizes[0], *sizes[1])
    return Fitted({"pos_embed": new}, {"pos_embed": how})


def positions_at(pos_embed: Tensor, grid: Size, height: int, width: int) -> Tensor:
    """Position embeddings (1, K + patches, D) of ``grid``, interpolated to ``height`` × ``width``
    patches; those of the K tokens in front stay. As :func:`interpolate_grid`, by two matrices: the
    gradient is the same in each run."""
    if (height, width) == (grid[0], grid[1]):
        return pos_embed
    number = pos_embed.shape[1] - grid[0] * grid[1]
    rows, columns = _resampling(grid[0], height, pos_embed), _resampling(grid[1], width, pos_embed)
    patches = pos_embed[0, number:].unflatten(0, grid)
    patches = torch.einsum("ir,jc,rcd->ijd", rows, columns, patches).flatten(0, 1)
    return torch.cat((pos_embed[:, :number], patches[None]), dim=1)


def _resampling(old: int, new: int, like: Tensor) -> Tensor:
    """What bicubic interpolation from ``old`` to ``new`` places takes of each, (new, old)."""
    each = torch.eye(old, device=like.device).view(1, old, old, 1)
    return _interpolate(each, (new, 1))[0, :, :, 0].T.to(like.dtype)


def interpolate_grid(x: Tensor, old: Size, new: Size) -> Tensor:
    """(1, rows·columns, D) embeddings of a grid, bicubically interpolated from the size ``old`` to
    ``new``: DeiT's way to finetune at another resolution (paper, section 3)."""
    if old == new:
        return x
    grid = x.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    return _interpolate(grid, new).flatten(2).transpose(1, 2)


def _interpolate(x: Tensor, size: Size) -> Tensor:
    """(1, D, rows, columns) maps at another ``size``."""
    return F.interpolate(x.float(), size=size, mode="bicubic", align_corners=False)
