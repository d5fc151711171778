"""CaiT, "Going deeper with Image Transformers" (Touvron et al. 2021, arXiv:2103.17239), registered
with timm under the published names, and the few pieces it shares with DeiT (``models.py``).

Names and shapes of the parameters are those of the published checkpoints.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from architectures.interface import ClassAttentionModel
from architectures.layers import Mlp, PatchEmbed, TokenAttention, classifier, init_linear
from architectures.position_embeddings import positions_at
from architectures.published import adapted
from architectures.registry import ALIASES, published, register
from architectures.talking_heads import exporting, talking_heads_attention

# A symbolic trace passes over them; they are called in this module.
torch.fx.wrap("talking_heads_attention")
torch.fx.wrap("_gelu_linear")


class Attention_talking_head(nn.Module):
    """Self-attention with talking heads (CaiT, section 3): (B, N, D) -> (B, N, D)."""

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
        self.head_dim = dim // num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_state_dict_post_hook(_mixing_last)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, d)
        dropout_p = self.attn_drop if self.training else 0.0
        x = talking_heads_attention(
            q,
            k,
            v,
            self.proj_l.weight,
            self.proj_l.bias,
            self.proj_w.weight,
            self.proj_w.bias,
            self.head_dim**-0.5,
            dropout_p,
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


def _mixing_last(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The published order of names. The parameters keep theirs, by which optimisers count."""
    for name in ("proj_l.weight", "proj_l.bias", "proj_w.weight", "proj_w.bias"):
        state[prefix + name] = state.pop(prefix + name)


class Class_Attention(TokenAttention):
    """Attention in which the class token alone asks (CaiT, section 2.2).

    (B, 1 + N, D) -> (B, 1, D): the class token comes first, it attends to itself and the patches.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x[:, :1], x)


class _GeluLinear(torch.autograd.Function):
    """Linear of GELU that keeps GELU's input alone and computes its output anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        # Under autocast the product was in half precision, the weight isn't.
        hidden = F.gelu(x).to(grad.dtype)
        dhidden = (grad @ weight.to(grad.dtype)).to(x.dtype)
        dweight = grad.flatten(0, -2).t() @ hidden.flatten(0, -2)
        dbias = grad.flatten(0, -2).sum(0)
        dx = torch.ops.aten.gelu_backward(dhidden, x)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear of GELU, which keeps ``x`` alone where that can be differentiated."""
    if torch.jit.is_scripting():
        return F.linear(F.gelu(x), weight, bias)
    else:
        if exporting():
            return F.linear(F.gelu(x), weight, bias)
        return _GeluLinear.apply(x, weight, bias)


class LeanMlp(Mlp):
    """The same MLP; training keeps little more than half as much of it for the backward pass.

    Once attention keeps no (N, N) tensors, the two (B, N, 4D) ones of the MLP are the largest.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.training and self.drop1.p == 0:
            x = _gelu_linear(x, self.fc2.weight, self.fc2.bias)
        else:
            x = self.fc2(self.drop1(self.act(x)))
        return self.drop2(x)


class LayerScale_Block(nn.Module):
    """Talking-heads attention and MLP, each scaled by a learnt vector (LayerScale, section 2.1)."""

    attention: type[nn.Module] = Attention_talking_head

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = self.attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = LeanMlp(dim, int(dim * mlp_ratio), drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class LayerScale_Block_CA(LayerScale_Block):
    """The same with class attention: reads the patches, changes only the class token.

    (B, N, D) patches, (B, 1, D) class token -> (B, 1, D).
    """

    attention = Class_Attention

    def forward(self, x: Tensor, cls_token: Tensor) -> Tensor:
        tokens = torch.cat((cls_token, x), dim=1)
        cls_token = cls_token + self.drop_path(self.gamma_1 * self.attn(self.norm1(tokens)))
        return cls_token + self.drop_path(self.gamma_2 * self.mlp(self.norm2(cls_token)))


class CaiT(ClassAttentionModel):
    """Patches through ``depth`` self-attention blocks, then a class token through
    ``depth_token_only`` class-attention blocks that read them.

    ``img_size`` is in pixels, one number or (height, width). Stochastic depth is the same in every
    block (paper, section 4.1), none in the class-attention blocks, nor any dropout. What happens
    around the blocks, and timm's interface, is in ``architectures/interface.py``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float = 1e-5,
        depth_token_only: int = 2,
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
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        shape = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "init_values": init_values,
        }
        drops = {"drop": drop_rate, "attn_drop": attn_drop_rate, "drop_path": drop_path_rate}
        self.blocks = nn.Sequential(*(LayerScale_Block(**shape, **drops) for _ in range(depth)))
        self.blocks_token_only = nn.ModuleList(
            LayerScale_Block_CA(**shape) for _ in range(depth_token_only)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = classifier(embed_dim, num_classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, N, D) patches with their positions."""
        positions = self.pos_embed
        if self.patch_embed.any_size and not torch.jit.is_scripting():
            grid = self.grid_of(x.shape[-2], x.shape[-1])
            positions = positions_at(positions, self.patch_embed.grid_size, *grid)
        return self.pos_drop(self.patch_embed(x) + positions)


# timm's name of each: the one with the published weights.
TIMM_NAMES = {
    "cait_XXS24_224": "cait_xxs24_224",
    "cait_XXS24": "cait_xxs24_384",
    "cait_XXS36_224": "cait_xxs36_224",
    "cait_XXS36": "cait_xxs36_384",
    "cait_XS24": "cait_xs24_384",
    "cait_S24_224": "cait_s24_224",
    "cait_S24": "cait_s24_384",
    "cait_S36": "cait_s36_384",
    "cait_M36": "cait_m36_384",
    "cait_M48": "cait_m48_448",
}
# Ours and timm's names lead to ours whatever their case.
ALIASES |= {name.lower(): name for name in TIMM_NAMES}
ALIASES |= {timm_name: name for name, timm_name in TIMM_NAMES.items()}

default_cfgs = generate_default_cfgs(
    {
        tagged: cfg
        for name, timm_name in TIMM_NAMES.items()
        for tagged, cfg in published(timm_name, name).items()
    }
)


def _cait(name: str, dim: int, depth: int, num_heads: int, init_values: float) -> Any:
    return register(
        name,
        CaiT,
        filter_fn=adapted,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        init_values=init_values,
    )


cait_XXS24_224 = _cait("cait_XXS24_224", dim=192, depth=24, num_heads=4, init_values=1e-5)
cait_XXS24 = _cait("cait_XXS24", dim=192, depth=24, num_heads=4, init_values=1e-5)
cait_XXS36_224 = _cait("cait_XXS36_224", dim=192, depth=36, num_heads=4, init_values=1e-5)
cait_XXS36 = _cait("cait_XXS36", dim=192, depth=36, num_heads=4, init_values=1e-5)
cait_XS24 = _cait("cait_XS24", dim=288, depth=24, num_heads=6, init_values=1e-5)
cait_S24_224 = _cait("cait_S24_224", dim=384, depth=24, num_heads=8, init_values=1e-5)
cait_S24 = _cait("cait_S24", dim=384, depth=24, num_heads=8, init_values=1e-5)
cait_S36 = _cait("cait_S36", dim=384, depth=36, num_heads=8, init_values=1e-6)
cait_M36 = _cait("cait_M36", dim=768, depth=36, num_heads=16, init_values=1e-6)
cait_M48 = _cait("cait_M48", dim=768, depth=48, num_heads=16, init_values=1e-6)
