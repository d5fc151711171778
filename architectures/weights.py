"""Weights of another model, fitted by name and shape."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import CheckpointError, first_names


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors, by name."""

    loaded: list[str] = field(default_factory=list)
    """Copied as they are."""
    resized: dict[str, str] = field(default_factory=dict)
    """Fitted to another grid, and how."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Left out, and why."""
    missing: list[str] = field(default_factory=list)
    """The model's own that keep their initial values."""

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"{name} resized ({how})" for name, how in self.resized.items()]
        if self.skipped:
            skipped = [f"{name} ({why})" for name, why in self.skipped.items()]
            parts.append(f"{len(skipped)} left out: {first_names(skipped, 6)}")
        if self.missing:
            parts.append(f"{len(self.missing)} newly initialised: {first_names(self.missing, 6)}")
        return "; ".join(parts)


def load_pretrained_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Copy into ``model`` what fits by name and shape, in place.

    Prefixes of DDP and torch.compile are stripped and position embeddings resized to the model's
    grid. A head for other classes stays as it was initialised, and so does what only the model has
    (the distillation token, given a plain checkpoint). Raises CheckpointError if less than a tenth
    of the model's values would be loaded: then it's another model's checkpoint.
    """
    own = model.state_dict()
    report = LoadReport()
    new: dict[str, Tensor] = {}
    source = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): x for name, x in state_dict.items()}
    for name, value in source.items():
        if name not in own:
            report.skipped[name] = "not in this model"
        elif not isinstance(value, Tensor):
            report.skipped[name] = "not a tensor"
        elif value.shape == own[name].shape:
            new[name] = value
            report.loaded.append(name)
        elif _is_grid_embedding(model, name, value):
            new[name], report.resized[name] = _resize_pos_embed(model, own[name], value, source)
        else:
            report.skipped[name] = f"{_shape(value)} in the checkpoint, {_shape(own[name])} here"
    report.missing.extend(name for name in own if name not in new)
    if sum(x.numel() for x in new.values()) < 0.1 * sum(x.numel() for x in own.values()):
        raise CheckpointError(
            f"the checkpoint belongs to another model: {len(new)} of {len(own)} tensors fit "
            f"{type(model).__name__}"
            + (f"; left out {first_names([f'{n} ({w})' for n, w in report.skipped.items()], 3)}")
        )
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
    return report


def _shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape)) or "scalar"


def _is_grid_embedding(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether ``name`` is a position embedding (1, tokens, D) over a grid of patches we know."""
    own = model.state_dict()[name]
    has_grid = name == "pos_embed" and hasattr(getattr(model, "patch_embed", None), "grid_size")
    return has_grid and value.ndim == own.ndim == 3 and value.shape[-1] == own.shape[-1]


def _resize_pos_embed(
    model: nn.Module, own: Tensor, value: Tensor, source: Mapping[str, Any]
) -> tuple[Tensor, str]:
    """``value`` (1, tokens, D) fitted to the grid of ``own``, and a word on how.

    Entries of the prefix tokens (class, distillation) are no part of the grid: those that both have
    are taken over, in order; one that only the model has keeps its own value.
    """
    rows, columns = model.patch_embed.grid_size
    own_prefix = own.shape[1] - rows * columns
    # CaiT and DeiT III have a class token without a position.
    names = ("cls_token", "dist_token")
    prefix = sum(name in source for name in names) if own_prefix else 0
    old_rows, old_columns = _grid_of(value.shape[1] - prefix, rows / columns)
    patches = interpolate_grid(value[:, prefix:], (old_rows, old_columns), (rows, columns))
    new = own.clone()
    kept = min(prefix, own_prefix)
    new[:, :kept] = value[:, :kept]
    new[:, own_prefix:] = patches
    return new, f"{old_rows}×{old_columns} to {rows}×{columns}"


def _grid_of(num_patches: int, aspect: float) -> tuple[int, int]:
    """(rows, columns) of a grid of which only the size is known: square if it can be, else nearest
    in shape to rows / columns = ``aspect``."""
    side = round(num_patches**0.5)
    if side * side == num_patches:
        return side, side
    shapes = [(r, num_patches // r) for r in range(1, num_patches + 1) if num_patches % r == 0]
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - aspect))


def interpolate_grid(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, rows·columns, D) embeddings of a grid, bicubically interpolated from the size ``old`` to
    ``new``: DeiT's way to finetune at another resolution (paper, section 3)."""
    if old == new:
        return x
    grid = x.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)
