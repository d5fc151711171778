"""The first convolution of weights for three colours, for images of other channels."""

from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

_COLOURS = 3


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
        if alike and old[1] == _COLOURS != new[1]:
            found[name] = adapt_input_conv(new[1], given[name])
            changes[name] = f"3 to {new[1]} channels"
    return found
