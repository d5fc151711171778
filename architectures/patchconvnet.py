"""PatchConvNet, "Augmenting Convolutional networks with attention-based aggregation" (Touvron et
al. 2021, arXiv:2112.13692), registered with timm under the names of facebookresearch/deit. Names
and shapes of the parameters are those of its checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from architectures.interface import ClassAttentionModel
from architectures.layers import Mlp, TokenAttention, classifier, init_linear
from architectures.published import adapted
from architectures.registry import ALIASES, plain_cfg, register


def _halving(in_chans: int, out_chans: int) -> nn.Sequential:
    """A 3 × 3 convolution of stride 2; the Sequential is part of its name."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, padding=1, bias=False)
    )


class ConvStem(nn.Module):
    """Four convolutions with GELU between them (section 3).

    (B, C, H, W) -> (B, ⌈H / 16⌉, ⌈W / 16⌉, D), the channels last.
    """

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            _halving(in_chans, embed_dim // 8),
            nn.GELU(),
            _halving(embed_dim // 8, embed_dim // 4),
            nn.GELU(),
            _halving(embed_dim // 4, embed_dim // 2),
            nn.GELU(),
            _halving(embed_dim // 2, embed_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class ConvMixing(nn.Module):
    """Pointwise, depthwise 3 × 3, squeeze-and-excitation, pointwise: (B, rows, columns, D) ->
    same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim),
            nn.GELU(),
            SqueezeExcite(dim, rd_ratio=0.25),
            nn.Conv2d(dim, dim, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv_pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """Convolutions, normalised before, scaled by a learnt vector and added to their input (section
    3): (B, rows, columns, D) -> same."""

    def __init__(self, dim: int, drop_path: float, init_values: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ConvMixing(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))


class Aggregation(TokenAttention):
    """Attention in which class tokens ask: (B, K, D), (B, N, D) that they read -> (B, K, D)."""

    def forward(self, classes: Tensor, read: Tensor) -> Tensor:
        return self.attend(classes, read)


class AggregationBlock(nn.Module):
    """Attention-based pooling (section 3): class tokens (B, K, D) and patches (B, N, D) to class
    tokens. They read the patches, and with ``read_classes`` each other."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop: float,
        attn_drop: float,
        init_values: float,
        read_classes: bool,
    ) -> None:
        super().__init__()
        self.read_classes = read_classes
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Aggregation(dim, num_heads, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, classes: Tensor, patches: Tensor) -> Tensor:
        asking, read = self.norm1(classes), self.norm1(patches)
        if self.read_classes:
            read = torch.cat((asking, read), dim=1)
        classes = classes + self.gamma_1 * self.attn(asking, read)
        return classes + self.gamma_2 * self.mlp(self.norm2(classes))


class PatchConvNet(ClassAttentionModel):
    """``depth`` blocks of convolutions at one resolution, then attention in the place of average
    pooling. Takes images of any size.

    Stochastic depth is the same in every block. ``drop_rate`` and ``attn_drop_rate`` are those of
    the pooling. ``forward_features`` returns a map, (B, D, rows, columns); ``global_pool`` "token"
    is the attention, "" leaves the map.
    """

    POOLS = ("token", "")
    num_prefix_tokens = 0
    read_classes = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 60,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float = 1e-4,
        depth_token_only: int = 1,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            patch_size=16,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
        )
        self.patch_embed = ConvStem(in_chans, embed_dim)
        self.blocks = nn.Sequential(
            *(ConvBlock(embed_dim, drop_path_rate, init_values) for _ in range(depth))
        )
        self.blocks_token_only = nn.ModuleList(
            AggregationBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                drop_rate,
                attn_drop_rate,
                init_values,
                self.read_classes,
            )
            for _ in range(depth_token_only)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear)
        self.cls_token = self._new_tokens()
        self.head = self._new_head()

    def _new_tokens(self, count: int = 1) -> nn.Parameter:
        tokens = self.norm.weight.new_zeros(1, count, self.embed_dim)
        return nn.Parameter(nn.init.trunc_normal_(tokens, std=0.02))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def finish(self, x: Tensor) -> Tensor:
        """(B, rows, columns, D) of the last block -> (B, D, rows, columns)."""
        return x.permute(0, 3, 1, 2)

    def aggregate(self, x: Tensor) -> Tensor:
        """(B, D, rows, columns) -> (B, K, D), the normalised class tokens after reading the map."""
        patches = x.flatten(2).transpose(1, 2)
        classes = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            classes = block(classes, patches)
        return self.norm(classes)

    def pool(self, x: Tensor) -> Tensor:
        """(B, D, rows, columns) -> (B, D), or as it is where ``global_pool`` is empty."""
        return self.aggregate(x)[:, 0] if self.global_pool == "token" else x


class MultiClassPatchConvNet(PatchConvNet):
    """The same with a token and a linear layer for each class, so that each class has its own
    attention (section 3). Without classes one token is left."""

    read_classes = False

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New tokens and layers for ``num_classes``; for 0 the tokens stay, to be averaged."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            self.cls_token = self._new_tokens()

    def _new_tokens(self) -> nn.Parameter:
        return super()._new_tokens(max(self.num_classes, 1))

    def _new_head(self) -> nn.Module:
        layers = nn.ModuleList(classifier(self.embed_dim, 1) for _ in range(self.num_classes))
        return layers.to(next(self.parameters())).apply(init_linear).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D, rows, columns) -> (B, classes) logits; with ``pre_logits`` or without classes the
        mean of the tokens, (B, D)."""
        if self.global_pool == "":
            return x
        x = self.aggregate(x)
        if pre_logits or self.num_classes == 0:
            return x.mean(dim=1)
        weight = torch.cat([layer.weight for layer in self.head])  # (K, D)
        bias = torch.cat([layer.bias for layer in self.head])
        return (x * weight).sum(-1) + bias


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict without the class tokens that belong to a head for other classes."""
    found = adapted(state_dict, model)
    if found["cls_token"].shape != model.cls_token.shape:
        del found["cls_token"]
    return found


_URL = "https://dl.fbaipublicfiles.com/deit/"


def _cfg(file: str = "", size: int = 224, **fields: Any) -> dict[str, Any]:
    """The configuration of one file; the crop is the default of the published evaluation."""
    fields = {
        "url": _URL + file if file else "",
        "crop_pct": 0.875,
        "pool_size": (size // 16, size // 16),
        "first_conv": "patch_embed.proj.0.0",
        "license": "apache-2.0",
    } | fields
    return plain_cfg(size, **fields)


_OF_EACH_CLASS = {"classifier": tuple(f"head.{i}" for i in range(1000))}

# The tags are timm's way to say what the weights were trained on.
default_cfgs = generate_default_cfgs(
    {
        "S60.fb_in1k": _cfg("s60_224_1k.pth"),
        "S60.fb_in22k_ft_in1k": _cfg("s60_224_21k.pth"),
        "S60.fb_in22k_ft_in1k_384": _cfg("s60_384_21k.pth", 384),
        "S60.fb_in22k_ft_in1k_512": _cfg("s60_512_21k.pth", 512),
        "S120.fb_in1k": _cfg("s120_224_1k.pth"),
        "B60.fb_in1k": _cfg("b60_224_1k.pth"),
        "B60.fb_in22k_ft_in1k": _cfg("b60_224_21k.pth"),
        "B60.fb_in22k_ft_in1k_384": _cfg("b60_384_21k.pth", 384),
        "B120.fb_in1k": _cfg("b120_224_1k.pth"),
        "B120.fb_in22k_ft_in1k": _cfg("b120_224_21k.pth"),
        "B120.fb_in22k_ft_in1k_384": _cfg("b120_384_21k.pth", 384),
        "L60.untrained": _cfg(),
        "L120.untrained": _cfg(),
        "S60_multi.fb_in1k": _cfg("s60_multi_scratch_1k.pth", **_OF_EACH_CLASS),
        "S60_multi.fb_ft_in1k": _cfg("s60_multi_finetune_1k.pth", **_OF_EACH_CLASS),
    }
)


def _patchconvnet(name: str, cls: type[PatchConvNet] = PatchConvNet, **architecture: Any) -> Any:
    ALIASES[name.lower()] = ALIASES[f"patchconvnet_{name.lower()}"] = name
    return register(name, cls, filter_fn=checkpoint_filter_fn, **architecture)


S60 = _patchconvnet("S60", depth=60)
S120 = _patchconvnet("S120", depth=120, init_values=1e-6)
B60 = _patchconvnet("B60", embed_dim=768, depth=60, init_values=1e-6)
B120 = _patchconvnet("B120", embed_dim=768, depth=120, init_values=1e-6)
L60 = _patchconvnet("L60", embed_dim=1024, depth=60, init_values=1e-6)
L120 = _patchconvnet("L120", embed_dim=1024, depth=120, init_values=1e-6)
S60_multi = _patchconvnet("S60_multi", MultiClassPatchConvNet, depth=60)
