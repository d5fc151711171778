"""The models: DeiT written out, small networks for small images, and every timm model by name.

DeiT: "Training data-efficient image transformers & distillation through attention" (Touvron et al.
2021, arXiv:2012.12877). DeiT III: "Revenge of the ViT" (2022, arXiv:2204.07118), and its parallel
blocks: "Three things everyone should know about Vision Transformers" (2022, arXiv:2203.09795).
Names and shapes of the parameters are those of the published checkpoints. Importing this module
registers all of them with timm, DeiT in place of timm's own.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

import cait_models  # noqa: F401 (registers CaiT)
from architectures import patchconvnet, resmlp  # noqa: F401 (register theirs)
from architectures.factory import build_model, resolve_name
from architectures.interface import TokenModel
from architectures.layers import Mlp, PatchEmbed, classifier, init_linear
from architectures.memory_format import wants_channels_last
from architectures.position_embeddings import positions_at
from architectures.published import adapted
from architectures.registry import ALIASES, plain_cfg, published, register
from architectures.small import CifarResNet, SmallCNN

__all__ = [
    "Attention",
    "Block",
    "CifarResNet",
    "DistilledVisionTransformer",
    "LayerScaleBlock",
    "ParallelBlock",
    "ParallelLayerScaleBlock",
    "SmallCNN",
    "VisionTransformer",
    "build_model",
    "resolve_name",
    "wants_channels_last",
]


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

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
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, d)
        dropout_p = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LayerScaleBlock(Block):
    """The same with each of the two results scaled by a learnt vector (LayerScale: CaiT, section
    2.1; DeiT III, section 3)."""

    def __init__(self, dim: int, *args: Any, init_values: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ParallelBlock(nn.Module):
    """Two attentions side by side, then two MLPs (Three things, section 3)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm11 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.attn1 = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm21 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.mlp1 = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.attn(self.norm1(x)), self.attn1(self.norm11(x))
        x = x + self.drop_path(first) + self.drop_path(second)
        first, second = self.mlp(self.norm2(x)), self.mlp1(self.norm21(x))
        return x + self.drop_path(first) + self.drop_path(second)


class ParallelLayerScaleBlock(ParallelBlock):
    """The same with each of the four results scaled by a learnt vector."""

    def __init__(self, dim: int, *args: Any, init_values: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_1_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2_1 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        first = self.gamma_1 * self.attn(self.norm1(x))
        second = self.gamma_1_1 * self.attn1(self.norm11(x))
        x = x + self.drop_path(first) + self.drop_path(second)
        first = self.gamma_2 * self.mlp(self.norm2(x))
        second = self.gamma_2_1 * self.mlp1(self.norm21(x))
        return x + self.drop_path(first) + self.drop_path(second)


class VisionTransformer(TokenModel):
    """ViT ("An Image is Worth 16x16 Words", arXiv:2010.11929) as DeiT trains it.

    Patches with a class token in front and learnt positions go through the blocks and a norm; the
    class token goes through the head. That way, and timm's interface, is in
    ``architectures/interface.py``.

    ``img_size`` is in pixels, one number or (height, width). Stochastic depth grows linearly over
    the blocks from 0 to ``drop_path_rate``, or is the same in all with ``constant_drop_path``.
    ``drop_rate`` is used at one of two places: "blocks" means after the position embedding, the
    projections and in the MLPs (DeiT), "head" before the head alone (DeiT III). With
    ``no_embed_class`` the class token has no position (DeiT III).

    Raises:
        ValueError: images of another size than ``img_size``, or one that patches don't tile.
    """

    num_prefix_tokens = num_block_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        block: type[nn.Module] = Block,
        no_embed_class: bool = False,
        constant_drop_path: bool = False,
        drop_at: Literal["blocks", "head"] = "blocks",
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
        )
        self.no_embed_class = no_embed_class
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        positions = self.patch_embed.num_patches
        positions += 0 if no_embed_class else self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        block_drop, head_drop = (drop_rate, 0.0) if drop_at == "blocks" else (0.0, drop_rate)
        self.pos_drop = nn.Dropout(block_drop)
        self.blocks = nn.Sequential(
            *(
                block(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop=block_drop,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * (1 if constant_drop_path else i / max(depth - 1, 1)),
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(head_drop) if head_drop else nn.Identity()
        self.head = classifier(embed_dim, num_classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def prefix_tokens(self) -> Tensor:
        """The learnt tokens that go in front of the patches, (1, num_prefix_tokens, D)."""
        return self.cls_token

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, num_prefix_tokens + N, D) tokens with their positions."""
        positions = self.pos_embed
        if self.patch_embed.any_size and not torch.jit.is_scripting():
            grid = self.grid_of(x.shape[-2], x.shape[-1])
            positions = positions_at(positions, self.patch_embed.grid_size, *grid)
        x = self.patch_embed(x)
        if self.no_embed_class:
            x = x + positions
        x = torch.cat((self.prefix_tokens().expand(x.shape[0], -1, -1), x), dim=1)
        return self.pos_drop(x if self.no_embed_class else x + positions)


class DistilledVisionTransformer(VisionTransformer):
    """DeiT with a distillation token and a head on it (DeiT paper, section 4).

    In training the output is (class head, distillation head), in evaluation their mean.
    """

    POOLS = ("token",)
    num_prefix_tokens = num_block_prefix_tokens = 2

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.head_dist = self._new_head()

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As above; "" (no pooling), which timm asks for, leaves the mean of the two tokens."""
        super().reset_classifier(num_classes, global_pool or None)
        self.head_dist = self._new_head()

    def prefix_tokens(self) -> Tensor:
        return torch.cat((self.cls_token, self.dist_token), dim=1)

    # The result in training is a pair; the annotation is for TorchScript, which compiles the rest.
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As above; ``pre_logits`` gives the mean of the two tokens."""
        of_class, of_teacher = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if not pre_logits:
            of_class, of_teacher = self.head(of_class), self.head_dist(of_teacher)
            if self.training and not torch.jit.is_scripting():
                return of_class, of_teacher
        return (of_class + of_teacher) / 2


_NANO = {"embed_dim": 128, "depth": 6, "num_heads": 4}
_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_MEDIUM = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
_GIANT_40 = {"embed_dim": 1408, "depth": 40, "num_heads": 16}
_GIANT_48 = {"embed_dim": 1664, "depth": 48, "num_heads": 16}

# Read by timm when a model of this module is registered.
default_cfgs: dict[str, Any] = {}


def _plain(name: str, size: int, **fields: Any) -> dict[str, Any]:
    """The configuration of a model without published weights."""
    return {name: plain_cfg(size, first_conv="patch_embed.proj", fixed_input_size=True, **fields)}


def _deit(name: str, patch_size: int, shape: dict[str, int], size: int | None = None) -> Any:
    """``size`` (pixels) is that of a model without published weights."""
    distilled = "_distilled_" in name
    heads = ("head", "head_dist") if distilled else "head"
    cfgs = _plain(name, size, classifier=heads) if size else published(name, name)
    default_cfgs.update(generate_default_cfgs(cfgs))
    cls = DistilledVisionTransformer if distilled else VisionTransformer
    return register(name, cls, filter_fn=adapted, patch_size=patch_size, **shape)


def _deit3(
    name: str, patch_size: int, block: type[nn.Module], shape: dict[str, int], **changes: int
) -> Any:
    # timm has a name for each size of the images, all with the same tags.
    timm_name = name.replace("deit_", "deit3_").removesuffix("_LS")
    cfgs = published(f"{timm_name}_224", name) | published(f"{timm_name}_384", name, "_384")
    default_cfgs.update(generate_default_cfgs(cfgs or _plain(name, 224)))
    return register(
        name,
        VisionTransformer,
        filter_fn=adapted,
        patch_size=patch_size,
        block=block,
        no_embed_class=True,
        constant_drop_path=True,
        drop_at="head",
        **(shape | changes),
    )


deit_tiny_patch16_224 = _deit("deit_tiny_patch16_224", 16, _TINY)
deit_small_patch16_224 = _deit("deit_small_patch16_224", 16, _SMALL)
deit_base_patch16_224 = _deit("deit_base_patch16_224", 16, _BASE)
deit_base_patch16_384 = _deit("deit_base_patch16_384", 16, _BASE)
deit_tiny_distilled_patch16_224 = _deit("deit_tiny_distilled_patch16_224", 16, _TINY)
deit_small_distilled_patch16_224 = _deit("deit_small_distilled_patch16_224", 16, _SMALL)
deit_base_distilled_patch16_224 = _deit("deit_base_distilled_patch16_224", 16, _BASE)
deit_base_distilled_patch16_384 = _deit("deit_base_distilled_patch16_384", 16, _BASE)

# For images of 32 × 32 pixels; nano trains on a laptop.
deit_tiny_patch4_32 = _deit("deit_tiny_patch4_32", 4, _TINY, 32)
deit_small_patch4_32 = _deit("deit_small_patch4_32", 4, _SMALL, 32)
deit_nano_patch4_32 = _deit("deit_nano_patch4_32", 4, _NANO, 32)
deit_tiny_distilled_patch4_32 = _deit("deit_tiny_distilled_patch4_32", 4, _TINY, 32)
deit_nano_distilled_patch4_32 = _deit("deit_nano_distilled_patch4_32", 4, _NANO, 32)

# DeiT III and parallel blocks, by the names of facebookresearch/deit.
_LS, _PARALLEL, _PARALLEL_LS = LayerScaleBlock, ParallelBlock, ParallelLayerScaleBlock
deit_tiny_patch16_LS = _deit3("deit_tiny_patch16_LS", 16, _LS, _TINY)
deit_small_patch16_LS = _deit3("deit_small_patch16_LS", 16, _LS, _SMALL)
deit_medium_patch16_LS = _deit3("deit_medium_patch16_LS", 16, _LS, _MEDIUM)
deit_base_patch16_LS = _deit3("deit_base_patch16_LS", 16, _LS, _BASE)
deit_large_patch16_LS = _deit3("deit_large_patch16_LS", 16, _LS, _LARGE)
deit_huge_patch14_LS = _deit3("deit_huge_patch14_LS", 14, _LS, _HUGE)
deit_huge_patch14_52_LS = _deit3("deit_huge_patch14_52_LS", 14, _LS, _HUGE, depth=52)
deit_huge_patch14_26x2_LS = _deit3("deit_huge_patch14_26x2_LS", 14, _PARALLEL_LS, _HUGE, depth=26)
deit_Giant_48x2_patch14_LS = _deit3("deit_Giant_48x2_patch14_LS", 14, _PARALLEL_LS, _GIANT_48)
deit_giant_40x2_patch14_LS = _deit3("deit_giant_40x2_patch14_LS", 14, _PARALLEL_LS, _GIANT_40)
deit_Giant_48_patch14_LS = _deit3("deit_Giant_48_patch14_LS", 14, _LS, _GIANT_48)
deit_giant_40_patch14_LS = _deit3("deit_giant_40_patch14_LS", 14, _LS, _GIANT_40)
deit_small_patch16_36_LS = _deit3("deit_small_patch16_36_LS", 16, _LS, _SMALL, depth=36)
deit_small_patch16_36 = _deit3("deit_small_patch16_36", 16, Block, _SMALL, depth=36)
deit_small_patch16_18x2_LS = _deit3(
    "deit_small_patch16_18x2_LS", 16, _PARALLEL_LS, _SMALL, depth=18
)
deit_small_patch16_18x2 = _deit3("deit_small_patch16_18x2", 16, _PARALLEL, _SMALL, depth=18)
deit_base_patch16_18x2_LS = _deit3("deit_base_patch16_18x2_LS", 16, _PARALLEL_LS, _BASE, depth=18)
deit_base_patch16_18x2 = _deit3("deit_base_patch16_18x2", 16, _PARALLEL, _BASE, depth=18)
deit_base_patch16_36x1_LS = _deit3("deit_base_patch16_36x1_LS", 16, _LS, _BASE, depth=36)
deit_base_patch16_36x1 = _deit3("deit_base_patch16_36x1", 16, Block, _BASE, depth=36)

ALIASES |= {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "deit_base_384": "deit_base_patch16_384",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "deit_base_distilled": "deit_base_distilled_patch16_224",
    "deit_base_distilled_384": "deit_base_distilled_patch16_384",
}
