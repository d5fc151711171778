"""Models that take images of several sizes, each with the weights of one."""

from typing import Any

from torch import nn

from architectures.arguments import takes_argument
from architectures.layers import PatchEmbed

_KEYWORD = "dynamic_img_size"


def keywords_for_other_sizes(name: str, num_classes: int) -> dict[str, Any]:
    """What timm's model ``name`` is built with in order to take images of other sizes too."""
    return {_KEYWORD: True} if takes_argument(name, _KEYWORD, num_classes) else {}


def take_other_sizes(model: nn.Module) -> None:
    """Let a DeiT or CaiT of this project interpolate its positions to the images that it gets.

    Other models stay as they are: what takes no other sizes shows when it is called.
    """
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and hasattr(model, "pos_embed"):
        embed.any_size = True
