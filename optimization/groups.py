"""Parameter groups: weight decay and learning-rate factors."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from errors import OptionError


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the classifier head, of both heads of a distilled model."""
    if not hasattr(model, "get_classifier"):
        return []
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """All parameters of ``model``, fixed ones included, by learning-rate factor and weight decay.

    Biases, other vectors (norms, layer scales) and what ``model.no_weight_decay()`` names don't
    decay. With ``layer_decay`` the parameters k layers below the head learn at ``layer_decay ** k``
    times the rate (BEiT, Bao et al. 2021), by the layers of ``model.group_matcher``;
    ``head_lr_scale`` multiplies the classifier's rate.

    Returns:
        Groups with the keys params, weight_decay and lr_scale.

    Raises:
        OptionError: the model doesn't say what its layers are, or has no classifier.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if layer_decay is not None:
        scales = _layer_scales(model, layer_decay)
    head: set[int] = set()
    if head_lr_scale != 1.0:
        head = {id(p) for p in classifier_parameters(model)}
        if not head:
            raise OptionError(
                "head_lr_scale", "the model has no classifier of its own: leave it out"
            )
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = scales[name] * (head_lr_scale if id(parameter) in head else 1.0)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or matches(name, exempt)
        decay = 0.0 if plain else weight_decay
        group = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning-rate factor of each parameter; 1 for the topmost layer."""
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise OptionError(
            "layer_decay",
            f"{type(model).__name__} doesn't say which parameters make a layer: leave it out",
        )
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    top = max(layers.values())
    return {
        name: layer_decay ** (top - layers.get(name, top)) for name, _ in model.named_parameters()
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter is named by a pattern: a glob, its name, or the module that holds it."""
    return any(fnmatchcase(name, p) or name.startswith(p.rstrip(".") + ".") for p in patterns)
