"""Adapters of low rank (LoRA) in a state dict, added to the layers that they belong to.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021, arXiv:2106.09685), section
4.1: a layer computes W x + α/r · B A x, so that W + α/r · B A does the same without them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errors import CheckpointError, printable, shortened

# peft's names of a layer with an adapter, and of the adapter's two matrices.
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def has_adapters(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has layers with adapters."""
    return any(name.endswith(DOWN) for name in weights)


def merged(weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """``weights`` by the names of the model without adapters, which it equals.

    ``options`` are those of the run: ``lora_alpha``, if not the rank.

    Raises:
        CheckpointError: an adapter without its layer, or of another shape.
    """
    alpha = options.get("lora_alpha")
    if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < 1e9):
        raise CheckpointError(f"its lora_alpha is {printable(shortened(str(alpha)))}")
    found = {n.replace(BASE, "."): x for n, x in weights.items() if not n.endswith((DOWN, UP))}
    for name, down in weights.items():
        if not name.endswith(DOWN):
            continue
        layer = name.removesuffix(DOWN)
        up, weight = weights.get(layer + UP), found.get(f"{layer}.weight")
        fits = up is not None and weight is not None and down.ndim == up.ndim == 2
        if not fits or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise CheckpointError(f"its adapter of {printable(layer)} lacks a part")
        if weight.shape != (up.shape[0], down.shape[1]):
            raise CheckpointError(f"its adapter of {printable(layer)} is of another layer")
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        found[f"{layer}.weight"] = weight + scale * (up.to(weight) @ down.to(weight))
    return found
