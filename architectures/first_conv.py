"""The first convolution for images of other channels: its weights, and the layer itself."""

from collections.abc import Mapping

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

COLOURS = 3  # channels that all models take


def adapt_first_convs(
    model: nn.Module, own: Mapping[str, Tensor], given: dict[str, Tensor], changes: dict[str, str]
) -> dict[str, Tensor]:
    """``given`` weights with the convolutions that see the image adapted as timm does: the sum of
    the colours for greys; else the colours over and over, times 3 / channels.

    Args:
        model: says in its ``pretrained_cfg`` what its first convolutions are called.
        own: its tensors.
        given: those of a checkpoint, by the model's names.
        changes: gets a note for each that is changed.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    found = dict(given)
    for layer in (named,) if isinstance(named, str) else named:
        name = f"{layer}.weight"
        if name not in own or name not in given:
            continue
        new, old = own[name].shape, given[name].shape
        alike = len(new) == len(old) == 4 and (new[0], *new[2:]) == (old[0], *old[2:])
        if alike and old[1] == COLOURS != new[1]:
            found[name] = adapt_input_conv(new[1], given[name])
            changes[name] = f"3 to {new[1]} channels"
    return found


def replace_first_conv(model: nn.Module, name: str, channels: int) -> None:
    """Put one for ``channels`` in the place of the convolution ``name`` of ``model``.

    Its weights are random, of a variance that lets the results vary as before.
    """
    old = model.get_submodule(name)
    assert isinstance(old, nn.Conv2d) and old.groups == 1, name
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    std = old.weight.std() * (old.in_channels / channels) ** 0.5
    with torch.no_grad():
        new.weight.copy_(torch.randn_like(new.weight) * std)
        if old.bias is not None:
            new.bias.copy_(old.bias)
    model.set_submodule(name, new)
