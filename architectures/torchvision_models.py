"""torchvision's classifiers by ``torchvision/NAME`` or ``torchvision/NAME.WEIGHTS``.

Their tensors keep torchvision's names, so that its published files fit as they are.
"""

import functools
import inspect
import re
import traceback
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as vision

from architectures.arguments import names_of_class
from architectures.first_conv import COLOURS, replace_first_conv
from architectures.library_model import TORCHVISION, LibraryModel, classifier_of, first_conv_of
from architectures.registry import plain_cfg
from architectures.sizes import height_width
from errors import OptionError, did_you_mean, first_names

_ARGUMENTS = {
    "drop_rate": "dropout",
    "drop_path_rate": "stochastic_depth_prob",
    "img_size": "image_size",
}
# What the published weights of Inception were trained with; the second output is for training
# alone, and no loss here takes it.
_INCEPTION = {"aux_logits": False, "transform_input": True, "init_weights": True}
_FIXED = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}
_SECOND_OUTPUTS = re.compile(r"^(?:aux[12]|AuxLogits)\.")
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def names() -> list[str]:
    """torchvision's classifiers, without the prefix."""
    return vision.list_models(module=vision)


def resolve(name: str) -> str:
    """``name`` if there is such a model, and such weights of it. Raises OptionError."""
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    if architecture not in names():
        hint = did_you_mean(architecture, names(), most=3, otherwise=f"{first_names(names(), 4)} …")
        raise OptionError("model", f"torchvision has no model {architecture!r}: {hint}")
    if tag and tag not in (tags := [w.name for w in vision.get_model_weights(architecture)]):
        hint = did_you_mean(tag, tags, otherwise=f"there are {first_names(tags)}")
        raise OptionError("model", f"torchvision's {architecture} has no weights {tag!r}: {hint}")
    return name


def takes(name: str, argument: str, value: Any = None) -> bool:
    """Whether the model takes the keyword ``argument``, by timm's name or torchvision's own."""
    try:
        _shapes_alone(name, {argument: value})
    except TypeError as error:
        return _in_constructor(error)
    except Exception:  # of any kind: it is taken, this value doesn't fit
        return True
    return True


def _in_constructor(error: TypeError) -> bool:
    """Whether the constructor of a module had begun: then it took the keyword, not this value."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(isinstance(frame.f_locals.get("self"), nn.Module) for frame, _ in frames)


def keyword_names(name: str) -> list[str]:
    """The keywords that a message can propose."""
    found = names_of_class(type(_shapes_alone(name)))
    return sorted(found - {"self", "kwargs"})


def build(name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The model without weights; ``arguments`` by timm's names or torchvision's."""
    model = _plain(name, num_classes, arguments)
    model.__class__ = _with_interface(type(model))
    model.num_classes = num_classes
    model.pretrained_cfg = published_cfg(name) | {
        "classifier": classifier_of(model, num_classes),
        "first_conv": first_conv_of(model, arguments.get("in_chans", COLOURS)),
    }
    return model


def _plain(name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    architecture = _architecture(name)
    function = vision.get_model_builder(architecture)
    named = {_ARGUMENTS.get(argument, argument): value for argument, value in arguments.items()}
    if architecture.startswith("densenet") and "dropout" in named:
        named["drop_rate"] = named.pop("dropout")
    if architecture.startswith("maxvit") and "image_size" in named:
        named["input_size"] = height_width(named.pop("image_size"))
    unknown = [argument for argument in named if argument in inspect.signature(function).parameters]
    if "in_chans" in named and architecture in _FIXED:  # they transform three colours
        unknown.append("in_chans")
    if unknown:  # "weights" and "progress" alone are named there
        raise TypeError(f"{architecture}() takes no {unknown[0]}")
    channels = named.pop("in_chans", COLOURS)
    model = function(num_classes=num_classes, **(_FIXED.get(architecture, {}) | named))
    if channels != COLOURS:
        replace_first_conv(model, first_conv_of(model, COLOURS), channels)
    return model


def _shapes_alone(name: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> nn.Module:
    """The model without values where it can be made so, and no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _plain(name, 1000, arguments)
        except NotImplementedError:  # RegNet's widths are computed by torch
            return _plain(name, 1000, arguments)


@functools.cache
def _with_interface(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (LibraryModel, cls), {"__module__": __name__})


def published_cfg(name: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of the model: what its weights were evaluated with, and where they
    are."""
    architecture = _architecture(name)
    cfg = plain_cfg(224, "") | {"architecture": name}
    weights = _weights(name)
    if weights is None:
        return cfg
    images = weights.transforms()
    [side], [resized] = images.crop_size, images.resize_size
    return cfg | {
        "url": weights.url,
        "tag": weights.name,
        "num_classes": len(weights.meta["categories"]),
        "label_names": list(weights.meta["categories"]),
        "input_size": (3, side, side),
        "crop_pct": side / resized,
        "interpolation": images.interpolation.value,
        "mean": tuple(images.mean),
        "std": tuple(images.std),
        "fixed_input_size": architecture.startswith("vit_"),
        "classifier": _classifier_name(architecture),
    }


@functools.cache
def _classifier_name(architecture: str) -> str:
    return classifier_of(_shapes_alone(architecture), 1000)


def published_weights(name: str) -> dict[str, Tensor]:
    """The state dict that torchvision publishes, downloaded once. Raises OSError."""
    weights = _weights(name)
    assert weights is not None, name
    return weights.get_state_dict(progress=False, check_hash=True)


def description(name: str) -> None:
    """Nothing: the library itself rebuilds the model."""
    return None


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict by the names of today, without the outputs for training alone."""
    return {
        _OLD_DENSENET.sub(r"\1\2", name): value
        for name, value in state_dict.items()
        if not _SECOND_OUTPUTS.match(name)
    }


def _weights(name: str) -> Any:
    """The member of the model's enumeration of weights; None where none are published."""
    kinds = vision.get_model_weights(_architecture(name))
    tag = name.removeprefix(TORCHVISION).partition(".")[2]
    if tag:
        return kinds[tag]
    return getattr(kinds, "DEFAULT", None)


def _architecture(name: str) -> str:
    return name.removeprefix(TORCHVISION).partition(".")[0]
