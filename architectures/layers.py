"""Layers that DeiT, CaiT, ResMLP and PatchConvNet share."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@torch.fx.wrap  # a comparison, which a symbolic trace can't look into
def sized(x: Tensor, img_size: tuple[int, int]) -> Tensor:
    """``x`` (B, C, H, W); ValueError unless (H, W) is ``img_size``."""
    height, width = x.shape[-2], x.shape[-1]
    if height != img_size[0] or width != img_size[1]:
        raise ValueError(
            f"the model was built for {img_size[0]}×{img_size[1]} pixels, "
            f"the images have {height}×{width}"
        )
    return x


@torch.fx.wrap
def tiled(x: Tensor, patch_size: int) -> Tensor:
    """``x`` (B, C, H, W); ValueError unless patches tile it."""
    height, width = x.shape[-2], x.shape[-1]
    if height % patch_size != 0 or width % patch_size != 0:
        raise ValueError(f"patches of {patch_size} pixels don't tile {height}×{width}")
    return x


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each: (B, C, H, W) -> (B, N, D).

    ``img_size`` (pixels) is one number or (height, width); ``grid_size`` is (rows, columns).
    Raises ValueError if the patches don't tile the image, or for images of another size, unless
    ``any_size`` is set.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"{height}×{width} pixels can't be cut into patches of {patch_size}: "
                f"use multiples of {patch_size}"
            )
        self.img_size = (height, width)
        self.patch_size = (patch_size, patch_size)
        self.any_size = False  # whether images of other sizes are taken too
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(tiled(x, self.patch_size[0]) if self.any_size else sized(x, self.img_size))
        return x.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, N, D)


class Mlp(nn.Module):
    """Two linear layers with GELU between them, over the last dimension."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class TokenAttention(nn.Module):
    """Attention in which some tokens ask and others are read; a subclass says in ``forward`` which.

    The queries, keys and values have a linear layer each (CaiT, section 2.2; PatchConvNet).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, asking: Tensor, read: Tensor) -> Tensor:
        """(B, K, D) tokens that ask, (B, N, D) that are read -> (B, K, D)."""
        # (B, tokens, D) -> (B, heads, tokens, d)
        q = self.q(asking).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k(read).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v(read).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dropout_p = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


def classifier(num_features: int, num_classes: int) -> nn.Module:
    """A linear layer, or the identity for no classes at all."""
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


def init_linear(module: nn.Module) -> None:
    """DeiT's initialisation: linear layers truncated normal (std 0.02), their biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, grad_checkpointing: bool) -> Tensor:
    """``x`` through all blocks; ``grad_checkpointing`` recomputes each in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if grad_checkpointing else block(x)
    return x
