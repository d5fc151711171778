"""Registering models with timm, so that they are built, loaded and taken apart as timm's own."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import timm
import timm.models
from timm.models import PretrainedCfg
from torch import Tensor, nn

from architectures.arguments import names_of_class

# Names under which a model is known besides its own, in lower case; the modules that define models
# add theirs.
ALIASES: dict[str, str] = {}

# What ``timm.models.build_model_with_cfg`` takes, whatever the model.
_OF_TIMMS_BUILDER = frozenset(inspect.signature(timm.models.build_model_with_cfg).parameters) | {
    "features_only",
    "out_indices",
    "feature_cls",
}

# How timm takes features from a model that has ``forward_intermediates``: of its last 3 blocks.
LAST_BLOCKS = {"out_indices": 3, "feature_cls": "getter"}


def plain_cfg(
    size: int, classifier: str | tuple[str, ...] = "head", **fields: Any
) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` for a model without published weights, whose ``fields`` win."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "classifier": classifier,
    } | fields


def published(architecture: str, name: str, suffix: str = "") -> dict[str, PretrainedCfg]:
    """timm's configurations of ``architecture``, weights included, as those of our model ``name``.

    The keys are ``NAME.TAG`` for ``timm.models.generate_default_cfgs``: timm's tags in timm's
    order, with ``suffix`` after them.
    """
    return {
        f"{name}.{cfg.tag}{suffix}": dataclasses.replace(cfg, architecture=None, tag=None)
        for cfg in timm.models.get_arch_pretrained_cfgs(architecture).values()
    }


def register(
    name: str,
    cls: Callable[..., nn.Module],
    *,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    features: Mapping[str, Any] = LAST_BLOCKS,
    module: str | None = None,
    **architecture: Any,
) -> Callable[..., nn.Module]:
    """Register ``cls(**architecture)`` with timm as ``name``; keyword arguments given later win.

    Its ``pretrained_cfg`` comes from ``default_cfgs`` of ``module`` (the name of the one that
    defines ``cls`` if None), made by ``timm.models.generate_default_cfgs`` above this call. An
    ``img_size`` needn't be given where that says ``fixed_input_size``. ``filter_fn`` takes a
    published state dict and the model, and returns one with the model's names and shapes.
    ``features`` says how ``features_only`` works: timm's ``feature_cfg``.

    A model of timm's that has the name already is still built where an argument is given that only
    timm's takes (``dynamic_img_size`` …).
    """
    replaced = timm.models.model_entrypoint(name) if timm.is_model(name) else None

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if replaced is not None and not kwargs.keys() <= names_of_class(cls) | _OF_TIMMS_BUILDER:
            return replaced(pretrained=pretrained, **kwargs)
        feature_cfg = dict(features)
        if "out_indices" in kwargs:
            feature_cfg["out_indices"] = kwargs.pop("out_indices")
        return timm.models.build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg=feature_cfg,
            **(architecture | kwargs),
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module or cls.__module__
    entry.model_cls = cls  # whose signature says which arguments the model takes
    entry.filter_fn = filter_fn  # for weights from elsewhere
    with warnings.catch_warnings():
        # DeiT takes the place of timm's models of the same names on purpose.
        warnings.filterwarnings("ignore", f"Overwriting {name} in registry")
        return timm.models.register_model(entry)
