"""What the models of other libraries share: their names, and timm's interface."""

from collections import Counter
from typing import Any

import torch
from torch import nn

TORCHVISION = "torchvision/"
TRANSFORMERS = "transformers/"
LIBRARIES = (TORCHVISION, TRANSFORMERS)

# Embeddings of positions and tokens, by the names of both libraries: no weight decay.
_EMBEDDINGS = ("class_token", "cls_token", "distillation_token", "mask_token")
_EMBEDDINGS += ("pos_embedding", "position_embeddings", "relative_position_bias_table")


class LibraryModel(nn.Module):
    """What timm asks of every model, for one of another library.

    The classifier is the last layer that has a row for each class.
    """

    pretrained_cfg: dict[str, Any]
    num_classes: int

    @property
    def classifier_name(self) -> str:
        """The name of the classifier's module; empty without one."""
        return self.pretrained_cfg["classifier"]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name) if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, or none for 0. Raises ValueError for a ``global_pool``."""
        if global_pool:
            raise ValueError(f"{type(self).__name__} has one way of pooling")
        parent, _, last = self.classifier_name.rpartition(".")
        old = self.get_submodule(self.classifier_name)
        new: nn.Module = nn.Identity()
        if num_classes and isinstance(old, nn.Conv2d):
            new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size)
        elif num_classes and isinstance(old, nn.Linear):
            new = nn.Linear(old.in_features, num_classes)
        elif num_classes:
            raise ValueError("the classifier was taken away before")
        self.num_classes = num_classes
        owner = self.get_submodule(parent)
        setattr(owner, last, new.to(next(self.parameters())).train(self.training))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides vectors."""
        return {name for name, _ in self.named_parameters() if name.endswith(_EMBEDDINGS)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Any:
        """timm's description of the layers from input to output: a function of parameter names."""
        return _layer_numbers(self, self.classifier_name).__getitem__


def _layer_numbers(model: nn.Module, classifier: str) -> dict[str, int]:
    """The layer of each parameter, from 0 for the stem.

    Layers are the members of lists most of which are blocks of one class, else what stands in the
    model and its sequences. What is between two of them belongs to the first; the classifier is
    the topmost.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{block}.") for block in blocks)
        if name and not inside and _is_list_of_blocks(module):
            blocks += [f"{name}.{member}" for member, _ in module.named_children()]
    blocks = blocks or _in_sequences(model)
    numbers: dict[str, int] = {}
    seen: set[str] = set()
    for name, _ in model.named_parameters():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        seen |= {block} if block is not None else set()
        numbers[name] = len(seen)
    top = len(seen) + 1
    return {n: top if n.startswith(f"{classifier}.") else k for n, k in numbers.items()}


def _is_list_of_blocks(module: nn.Module) -> bool:
    listed = isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module) is nn.Sequential
    members = Counter(type(member) for member in module.children() if any(member.children()))
    members.pop(nn.Sequential, None)
    return bool(listed and members and max(2, len(module) / 2) <= max(members.values()))


def _in_sequences(model: nn.Module, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, module in model.named_children():
        inner = _in_sequences(module, f"{prefix}{name}.") if type(module) is nn.Sequential else []
        found += inner or [prefix + name]
    return found


def classifier_of(model: nn.Module, num_classes: int) -> str:
    """The name of the last layer with ``num_classes`` outputs; empty without one."""
    found = ""
    for name, module in model.named_modules():
        outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
        if isinstance(module, nn.Linear | nn.Conv2d) and outputs == num_classes:
            found = name
    return found


def first_conv_of(model: nn.Module, channels: int) -> str:
    """The name of the first convolution over ``channels``; empty without one."""
    convolutions = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return next((name for name, m in convolutions if m.in_channels == channels), "")
