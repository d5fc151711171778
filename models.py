"""The models: DeiT written out, small networks for small images, and every timm model by name.

DeiT: "Training data-efficient image transformers & distillation through attention" (Touvron et al.
2021, arXiv:2012.12877). Names and shapes of the parameters are those of the published checkpoints.
Importing this module registers all of them with timm, DeiT in place of timm's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import deit as timm_deit
from torch import Tensor, nn

import cait_models  # noqa: F401 (registers CaiT)
from architectures.factory import build_model, resolve_name, wants_channels_last
from architectures.layers import Mlp, PatchEmbed, classifier, init_linear, run_blocks
from architectures.registry import ALIASES, plain_cfg, register
from architectures.small import CifarResNet, SmallCNN

__all__ = [
    "Attention",
    "Block",
    "CifarResNet",
    "DistilledVisionTransformer",
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


class VisionTransformer(nn.Module):
    """ViT ("An Image is Worth 16x16 Words", arXiv:2010.11929) as DeiT trains it.

    ``img_size`` is in pixels, one number or (height, width). ``drop_rate`` is DeiT's: after the
    position embedding, the projections and in the MLPs. Stochastic depth grows linearly over the
    blocks from 0 to ``drop_path_rate``. Raises ValueError for images of another size.
    """

    num_prefix_tokens = 1  # the tokens in front of the patches
    timm_module = timm_deit  # whose models of the same names have published weights

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = classifier(embed_dim, num_classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers from input to output, for layer-wise learning rates."""
        return {
            "stem": r"^(?:cls_token|dist_token|pos_embed|patch_embed)",
            "blocks": [
                (r"^blocks\.(\d+)", None),
                (r"^norm", (99999,)),  # timm's mark for "with the layer before"
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes``; only ``global_pool`` "token" is possible."""
        if global_pool not in (None, "token"):
            raise ValueError(f"DeiT classifies by its tokens, not by pooling ({global_pool})")
        self.num_classes = num_classes
        self.head = self._new_head()

    def _new_head(self) -> nn.Module:
        head = classifier(self.num_features, self.num_classes).to(self.norm.weight)
        return head.apply(init_linear)

    def prefix_tokens(self) -> Tensor:
        """The learnt tokens that go in front of the patches, (1, num_prefix_tokens, D)."""
        return self.cls_token

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, num_prefix_tokens + N, D) normalised tokens."""
        x = self.patch_embed(x)
        x = torch.cat((self.prefix_tokens().expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, tokens, D) -> (B, classes) logits, or (B, D) features with ``pre_logits``."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """(B, C, H, W) images -> what ``forward_head`` makes of them."""
        return self.forward_head(self.forward_features(x))


class DistilledVisionTransformer(VisionTransformer):
    """DeiT with a distillation token and a head on it (DeiT paper, section 4).

    In training the output is (class head, distillation head), in evaluation their mean.
    """

    num_prefix_tokens = 2

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.head_dist = self._new_head()

    def get_classifier(self) -> tuple[nn.Module, ...]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = self._new_head()

    def prefix_tokens(self) -> Tensor:
        return torch.cat((self.cls_token, self.dist_token), dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """As above; ``pre_logits`` gives the mean of the two tokens."""
        if pre_logits:
            return (x[:, 0] + x[:, 1]) / 2
        logits, logits_dist = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_NANO = {"embed_dim": 128, "depth": 6, "num_heads": 4}

# Read by timm when a model of this module is registered: where the published weights are.
default_cfgs = {
    name: cfg for name, cfg in timm_deit.default_cfgs.items() if name.startswith("deit_")
}


def _deit(name: str, img_size: int, patch_size: int, shape: dict[str, int]) -> Any:
    distilled = "_distilled_" in name
    cfg = name
    if name not in default_cfgs:
        cfg = plain_cfg(img_size, ("head", "head_dist") if distilled else "head")
    build = DistilledVisionTransformer if distilled else VisionTransformer
    return register(name, build, cfg, img_size=img_size, patch_size=patch_size, **shape)


deit_tiny_patch16_224 = _deit("deit_tiny_patch16_224", 224, 16, _TINY)
deit_small_patch16_224 = _deit("deit_small_patch16_224", 224, 16, _SMALL)
deit_base_patch16_224 = _deit("deit_base_patch16_224", 224, 16, _BASE)
deit_base_patch16_384 = _deit("deit_base_patch16_384", 384, 16, _BASE)
deit_tiny_distilled_patch16_224 = _deit("deit_tiny_distilled_patch16_224", 224, 16, _TINY)
deit_small_distilled_patch16_224 = _deit("deit_small_distilled_patch16_224", 224, 16, _SMALL)
deit_base_distilled_patch16_224 = _deit("deit_base_distilled_patch16_224", 224, 16, _BASE)
deit_base_distilled_patch16_384 = _deit("deit_base_distilled_patch16_384", 384, 16, _BASE)

# For images of 32 × 32 pixels; nano trains on a laptop.
deit_tiny_patch4_32 = _deit("deit_tiny_patch4_32", 32, 4, _TINY)
deit_small_patch4_32 = _deit("deit_small_patch4_32", 32, 4, _SMALL)
deit_nano_patch4_32 = _deit("deit_nano_patch4_32", 32, 4, _NANO)
deit_tiny_distilled_patch4_32 = _deit("deit_tiny_distilled_patch4_32", 32, 4, _TINY)
deit_nano_distilled_patch4_32 = _deit("deit_nano_distilled_patch4_32", 32, 4, _NANO)

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
