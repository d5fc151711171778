"""Registering models with timm."""

import warnings
from collections.abc import Callable
from typing import Any

import timm
import timm.models
from torch import nn

# Names under which a model is known besides its own, in lower case; the modules that define models
# add theirs.
ALIASES: dict[str, str] = {}


def plain_cfg(size: int, classifier: str | tuple[str, ...] = "head") -> dict[str, Any]:
    """timm's ``pretrained_cfg`` for a model without published weights."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "classifier": classifier,
    }


def register(
    name: str,
    build: Callable[..., nn.Module],
    cfg: str | dict[str, Any],
    **architecture: Any,
) -> Callable[..., nn.Module]:
    """Register ``build(**architecture)`` with timm as ``name``; keyword arguments given later win.

    ``cfg`` is the model's ``pretrained_cfg``, or the name under which timm publishes weights for
    the same architecture: then theirs is taken. The weights themselves come through
    ``models.build_model``, which fits them to other sizes and class counts.
    """

    def entry(
        pretrained: bool = False,
        pretrained_cfg: str | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"use models.build_model({name!r}, ..., pretrained=True)")
        model = build(**(architecture | kwargs))
        if isinstance(cfg, str):
            tagged = f"{cfg}.{pretrained_cfg}" if pretrained_cfg else cfg
            model.pretrained_cfg = timm.get_pretrained_cfg(tagged).to_dict()
        else:
            model.pretrained_cfg = {"architecture": name} | cfg
        model.pretrained_cfg |= pretrained_cfg_overlay or {}
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = build.__module__
    entry.build = build  # whose signature says which arguments the model takes
    with warnings.catch_warnings():
        # DeiT takes the place of timm's models of the same names on purpose.
        warnings.filterwarnings("ignore", f"Overwriting {name} in registry")
        return timm.models.register_model(entry)
