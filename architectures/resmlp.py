"""ResMLP, "ResMLP: Feedforward networks for image classification with data-efficient training"
(Touvron et al. 2021, arXiv:2105.03404), registered with timm under the names of
facebookresearch/deit. Names and shapes of the parameters are those of its checkpoints.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from architectures.interface import TokenModel
from architectures.layers import Mlp, PatchEmbed, classifier, init_linear
from architectures.registry import ALIASES, published, register
from errors import CheckpointError


class Affine(nn.Module):
    """A learnt scale and shift of each channel, in a norm's place (equation 1): (…, D) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMlpBlock(nn.Module):
    """A linear layer across the patches, then an MLP across the channels, each scaled by a learnt
    vector and added to its input (equations 2 and 3): (B, ``num_patches``, D) -> same."""

    def __init__(
        self, dim: int, num_patches: int, drop: float, drop_path: float, init_values: float
    ) -> None:
        super().__init__()
        self.norm1 = Affine(dim)
        self.attn = nn.Linear(num_patches, num_patches)
        self.norm2 = Affine(dim)
        self.mlp = Mlp(dim, 4 * dim, drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.drop_path(self.gamma_1 * mixed)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ResMLP(TokenModel):
    """Patches through ``depth`` blocks without any attention or norm, then their mean.

    ``img_size`` is in pixels, one number or (height, width); it decides the size of the layers
    across the patches. ``drop_rate`` is that of the MLPs. Stochastic depth is the same in every
    block. ``forward_features`` returns a map, (B, D, rows, columns).
    """

    POOLS = ("avg", "")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float = 1e-4,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
        )
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_patches = self.patch_embed.num_patches
        self.blocks = nn.Sequential(
            *(
                ResMlpBlock(embed_dim, num_patches, drop_rate, drop_path_rate, init_values)
                for _ in range(depth)
            )
        )
        self.norm = Affine(embed_dim)
        self.head = classifier(embed_dim, num_classes)
        self.apply(init_linear)

    def finish(self, x: Tensor) -> Tensor:
        """(B, N, D) of the last block -> (B, D, rows, columns), scaled and shifted."""
        rows, columns = self.patch_embed.grid_size
        return self.norm(x).transpose(1, 2).unflatten(2, (rows, columns))

    def pool(self, x: Tensor) -> Tensor:
        """(B, D, rows, columns) -> (B, D), or as it is where ``global_pool`` is empty."""
        return x.mean((2, 3)) if self.global_pool == "avg" else x


# timm's names of the parameters, and those of facebookresearch/deit.
_NAMES = (
    (r"^stem\.", "patch_embed."),
    (r"\.linear_tokens\.", ".attn."),
    (r"\.mlp_channels\.", ".mlp."),
    (r"\.ls(\d)$", r".gamma_\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of timm or of facebookresearch/deit with ``model``'s names and shapes.

    Raises CheckpointError for weights of another number of patches.
    """
    found = {}
    for name, x in state_dict.items():
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        found[name] = x.flatten() if name.endswith((".alpha", ".beta")) else x
    there, here = len(found["blocks.0.attn.bias"]), model.patch_embed.num_patches
    if there != here:
        raise CheckpointError(
            f"the weights of this ResMLP are for images of {there} patches, the model has {here}: "
            "its layers across the patches can't be resized, leave --input-size out"
        )
    return found


# timm's name of each: the one with the published weights.
TIMM_NAMES = {
    "resmlp_12": "resmlp_12_224",
    "resmlp_24": "resmlp_24_224",
    "resmlp_36": "resmlp_36_224",
    "resmlpB_24": "resmlp_big_24_224",
}
ALIASES |= {"resmlpb_24": "resmlpB_24"}

default_cfgs = generate_default_cfgs(
    {
        tagged: dataclasses.replace(
            cfg,
            first_conv="patch_embed.proj",
            pool_size=(28, 28) if name == "resmlpB_24" else (14, 14),
        )
        for name, timm_name in TIMM_NAMES.items()
        for tagged, cfg in published(timm_name, name).items()
    }
)


def _resmlp(name: str, **architecture: Any) -> Any:
    return register(name, ResMLP, filter_fn=checkpoint_filter_fn, **architecture)


resmlp_12 = _resmlp("resmlp_12", depth=12, init_values=0.1)
resmlp_24 = _resmlp("resmlp_24", depth=24, init_values=1e-5)
resmlp_36 = _resmlp("resmlp_36", depth=36, init_values=1e-6)
resmlpB_24 = _resmlp("resmlpB_24", patch_size=8, embed_dim=768, depth=24, init_values=1e-6)
