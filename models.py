"""The models: DeiT written out, small networks for small pictures, and every timm model by name.

DeiT: "Training data-efficient image transformers & distillation through attention" (Touvron et al.
2021, arXiv:2012.12877). Names and shapes of the parameters are those of the published checkpoints.
Importing this module registers all of them with timm, DeiT in place of timm's own.
"""

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import timm.models
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import cait as timm_cait
from timm.models import deit as timm_deit
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cait_models
from cait_models import (
    CaiT,
    Mlp,
    PatchEmbed,
    classifier,
    init_linear,
    plain_cfg,
    register,
    run_blocks,
)
from errors import CheckpointError, OptionError

log = logging.getLogger(__name__)

# --- DeiT ---------------------------------------------------------------------------------------


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
    blocks from 0 to ``drop_path_rate``. Raises ValueError for pictures of another size.
    """

    num_prefix_tokens = 1  # the tokens in front of the patches

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
        """(B, C, H, W) pictures -> (B, num_prefix_tokens + N, D) normalised tokens."""
        x = self.patch_embed(x)
        x = torch.cat((self.prefix_tokens().expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, tokens, D) -> (B, classes) logits, or (B, D) features with ``pre_logits``."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """(B, C, H, W) pictures -> what ``forward_head`` makes of them."""
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

# For pictures of 32 × 32 pixels; nano trains on a laptop.
deit_tiny_patch4_32 = _deit("deit_tiny_patch4_32", 32, 4, _TINY)
deit_small_patch4_32 = _deit("deit_small_patch4_32", 32, 4, _SMALL)
deit_nano_patch4_32 = _deit("deit_nano_patch4_32", 32, 4, _NANO)
deit_tiny_distilled_patch4_32 = _deit("deit_tiny_distilled_patch4_32", 32, 4, _TINY)
deit_nano_distilled_patch4_32 = _deit("deit_nano_distilled_patch4_32", 32, 4, _NANO)

# --- convolutional networks for small pictures --------------------------------------------------


class CifarResNet(ResNet):
    """timm's ResNet with the stem of the CIFAR networks: 3 × 3 convolution, no max-pooling
    ("Deep Residual Learning", arXiv:1512.03385, section 4.2)."""

    def __init__(self, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()


class SmallCNN(nn.Module):
    """A feature extractor, then dropout and one linear layer.

    ``features`` takes (B, ``in_chans``, H, W) with H and W of at least 16 to (B, ``num_features``).
    """

    def __init__(
        self, features: nn.Sequential, num_features: int, num_classes: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.features = features
        self.head_drop = nn.Dropout(drop_rate)
        self.head = classifier(num_features, num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers from input to output, for layer-wise learning rates."""
        return {"features": r"^features\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes``; the pooling can't be changed."""
        if global_pool is not None:
            raise ValueError("the pooling of the small networks is fixed")
        self.num_classes = num_classes
        self.head = classifier(self.num_features, num_classes).to(next(self.parameters()))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) pictures -> (B, classes) logits."""
        return self.forward_head(self.forward_features(x))


def _conv(in_chans: int, out_chans: int, kernel_size: int, pool: bool) -> nn.Sequential:
    """Convolution, batch norm, ReLU and, with ``pool``, max-pooling to half the size."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2) if pool else nn.Identity(),
    )


def _simple_cnn(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> SmallCNN:
    """Six 3 × 3 convolutions and global average pooling, 1.1 M parameters besides the head."""
    features = nn.Sequential(
        _conv(in_chans, 64, 3, pool=False),
        _conv(64, 64, 3, pool=True),
        _conv(64, 128, 3, pool=False),
        _conv(128, 128, 3, pool=True),
        _conv(128, 256, 3, pool=False),
        _conv(256, 256, 3, pool=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return SmallCNN(features, 256, num_classes, drop_rate)


def _modern_lenet(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> SmallCNN:
    """LeNet-5's layout (LeCun et al. 1998) with batch norm, ReLU and max-pooling, wider."""
    features = nn.Sequential(
        _conv(in_chans, 32, 5, pool=True),
        _conv(32, 64, 5, pool=True),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Sequential(nn.Dropout(drop_rate), nn.Linear(64 * 4 * 4, 120), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU(inplace=True)),
    )
    return SmallCNN(features, 84, num_classes, drop_rate)


def _cifar_resnet(name: str, layers: tuple[int, ...]) -> Any:
    return register(name, CifarResNet, plain_cfg(32, "fc"), block=BasicBlock, layers=layers)


resnet18_cifar = _cifar_resnet("resnet18_cifar", (2, 2, 2, 2))
resnet34_cifar = _cifar_resnet("resnet34_cifar", (3, 4, 6, 3))
simple_cnn = register("simple_cnn", _simple_cnn, plain_cfg(32))
modern_lenet = register("modern_lenet", _modern_lenet, plain_cfg(32))

# --- by name ------------------------------------------------------------------------------------

# Lower case; CaiT's names (ours and timm's) lead to ours whatever their case.
_ALIASES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "deit_base_384": "deit_base_patch16_384",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "deit_base_distilled": "deit_base_distilled_patch16_224",
    "deit_base_distilled_384": "deit_base_distilled_patch16_384",
    **{name.lower(): name for name in cait_models.TIMM_NAMES},
    **{timm_name: name for name, timm_name in cait_models.TIMM_NAMES.items()},
}

# Our options and the arguments by which timm's models know them.
_ARGUMENTS = {
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
    "input_size": "img_size",
}


def resolve_name(name: str) -> str:
    """The name timm knows for ``name``: short names and CaiT in any case are allowed.

    A tag of timm's ("resnet50.a1_in1k") stays, and so do its sources ("hf-hub:OWNER/NAME",
    "local-dir:FOLDER"). Raises OptionError with the nearest names for an unknown one.
    """
    if name.startswith(("hf-hub:", "local-dir:")):
        return name
    architecture, dot, tag = name.partition(".")
    resolved = _ALIASES.get(architecture.lower(), architecture) + dot + tag
    if timm.is_model(resolved):
        return resolved
    known = [*_ALIASES, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
    raise OptionError("model", f"unknown model {name!r}: {hint}")


def build_model(
    name: str,
    num_classes: int,
    *,
    input_size: int = 224,
    drop: float = 0.0,
    drop_path: float = 0.0,
    drop_block: float | None = None,
    pretrained: bool = False,
    grad_checkpointing: bool = False,
    required: Collection[str] = (),
) -> nn.Module:
    """A model by name, for square pictures of ``input_size`` pixels.

    ``required`` are the options asked for, as opposed to defaults: a model that doesn't take one of
    those raises OptionError, a default it doesn't take is left out with a note in the log. A model
    without an ``img_size`` takes pictures of any size. ``pretrained`` starts from the weights timm
    publishes; position embeddings and the head are fitted. Every model built has a
    ``pretrained_cfg`` with mean, std, crop_pct and interpolation.
    """
    name = resolve_name(name)
    values = {
        "drop": drop,
        "drop_path": drop_path,
        "drop_block": drop_block,
        "input_size": input_size,
    }
    values = {option: value for option, value in values.items() if value is not None}
    model = _create(name, num_classes, values, required)
    _complete_cfg(model, name)
    if "input_size" in values and "input_size" not in required:
        native = model.pretrained_cfg["input_size"][-1]
        if native != input_size:
            log.warning(
                "%s is meant for %d pixels and built for %d: see --input-size",
                name,
                native,
                input_size,
            )
    if pretrained:
        model = _with_published_weights(model, name, num_classes, values)
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise OptionError("grad_checkpointing", f"{name} has none: leave it out") from None
    return model


def _create(
    name: str, num_classes: int, values: dict[str, Any], required: Collection[str]
) -> nn.Module:
    """Build ``name`` with the options in ``values`` that it takes, and remove the others there."""
    while True:
        try:
            return _timm_model(name, num_classes, values)
        except TypeError as error:
            _, refused, arguments = str(error).partition("unexpected keyword argument")
            words = re.findall(r"'(\w+)'", arguments)
            options = [option for option in values if _ARGUMENTS[option] in words]
            if refused and not options:
                message = f"{name} can't be built by timm ({error}): let it take **kwargs"
                raise OptionError("model", message) from error
            if not options:
                raise
            for option in options:
                _leave_out(option, values.pop(option), name, required)
        except (ValueError, AssertionError) as error:
            if "input_size" not in values:
                raise
            # The size is to blame if the model can be built without it.
            others = {option: value for option, value in values.items() if option != "input_size"}
            _create(name, num_classes, others, required)
            message = f"{name} can't be built for {values['input_size']} pixels"
            raise OptionError("input_size", f"{message} ({_first_line(error)})") from error
        except OSError as error:
            raise OptionError("model", f"{name} can't be fetched ({_first_line(error)})") from error


def _leave_out(option: str, value: float, name: str, required: Collection[str]) -> None:
    """Say that ``name`` doesn't take ``option``, unless that changes nothing."""
    if option == "input_size" or not value:  # without img_size a model takes any size
        return
    message = f"{name} takes no {_ARGUMENTS[option]}"
    if option in required:
        raise OptionError(option, f"{message}: leave it out")
    log.info("%s: --%s is left out", message, option.replace("_", "-"))


def _timm_model(name: str, num_classes: int, values: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    arguments = {_ARGUMENTS[option]: value for option, value in values.items()}
    return timm.create_model(name, num_classes=num_classes, **arguments, **kwargs)


def _complete_cfg(model: nn.Module, name: str) -> None:
    """Give ``model`` a ``pretrained_cfg`` (a model of a plugin may have none) without gaps."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = plain_cfg(224, "head") | {"architecture": name} | cfg


def _with_published_weights(
    model: nn.Module, name: str, num_classes: int, values: Mapping[str, Any]
) -> nn.Module:
    """``model`` with the weights timm publishes for it; raises OptionError where there are none."""
    cfg = model.pretrained_cfg
    if not any(cfg.get(source) for source in ("hf_hub_id", "url", "file", "state_dict")):
        raise OptionError("pretrained", f"nobody publishes weights of {name}: leave it out")
    try:
        if not isinstance(model, VisionTransformer | CaiT):
            model = _timm_model(name, num_classes, values, pretrained=True)
            _complete_cfg(model, name)
            return model
        twins = timm_cait if isinstance(model, CaiT) else timm_deit
        twin = getattr(twins, cfg["architecture"])(pretrained=True, pretrained_cfg=cfg)
    except (OSError, RuntimeError) as error:
        raise OptionError(
            "pretrained",
            f"the weights of {name} couldn't be fetched ({_first_line(error)}): "
            "get the file on a machine with a network and use --finetune FILE",
        ) from error
    log.info("%s: %s", name, load_pretrained_weights(model, twin.state_dict()).summary())
    return model


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- weights of another model -------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors, by name. ``resized`` and ``skipped`` tell how and why;
    ``missing`` are the model's own that keep their initial values."""

    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"{name} resized ({how})" for name, how in self.resized.items()]
        if self.skipped:
            skipped = [f"{name} ({why})" for name, why in self.skipped.items()]
            parts.append(f"{len(skipped)} left out: {_some(skipped)}")
        if self.missing:
            parts.append(f"{len(self.missing)} newly initialised: {_some(self.missing)}")
        return "; ".join(parts)


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def load_pretrained_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Copy into ``model`` what fits by name and shape, in place.

    Prefixes of DDP and torch.compile are stripped and position embeddings resized to the model's
    grid. A head for other classes stays as it was initialised, and so does what only the model has
    (the distillation token, given a plain checkpoint). Raises CheckpointError if less than a tenth
    of the model's values would be loaded: then it's another model's checkpoint.
    """
    own = model.state_dict()
    report = LoadReport()
    new: dict[str, Tensor] = {}
    source = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): x for name, x in state_dict.items()}
    for name, value in source.items():
        if name not in own:
            report.skipped[name] = "not in this model"
        elif not isinstance(value, Tensor):
            report.skipped[name] = "not a tensor"
        elif value.shape == own[name].shape:
            new[name] = value
            report.loaded.append(name)
        elif _is_grid_embedding(model, name, value):
            new[name], report.resized[name] = _resize_pos_embed(model, own[name], value, source)
        else:
            report.skipped[name] = f"{_shape(value)} in the checkpoint, {_shape(own[name])} here"
    report.missing.extend(name for name in own if name not in new)
    if sum(x.numel() for x in new.values()) < 0.1 * sum(x.numel() for x in own.values()):
        raise CheckpointError(
            f"the checkpoint belongs to another model: {len(new)} of {len(own)} tensors fit "
            f"{type(model).__name__}"
            + (f"; left out {_some([f'{n} ({w})' for n, w in report.skipped.items()], 3)}")
        )
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
    return report


def _shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape)) or "scalar"


def _is_grid_embedding(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether ``name`` is a position embedding (1, tokens, D) over a grid of patches we know."""
    own = model.state_dict()[name]
    has_grid = name == "pos_embed" and hasattr(getattr(model, "patch_embed", None), "grid_size")
    return has_grid and value.ndim == own.ndim == 3 and value.shape[-1] == own.shape[-1]


def _resize_pos_embed(
    model: nn.Module, own: Tensor, value: Tensor, source: Mapping[str, Any]
) -> tuple[Tensor, str]:
    """``value`` (1, tokens, D) fitted to the grid of ``own``, and a word on how.

    Entries of the prefix tokens (class, distillation) are no part of the grid: those that both have
    are taken over, in order; one that only the model has keeps its own value.
    """
    rows, columns = model.patch_embed.grid_size
    own_prefix = own.shape[1] - rows * columns
    # CaiT and DeiT III have a class token without a position.
    names = ("cls_token", "dist_token")
    prefix = sum(name in source for name in names) if own_prefix else 0
    old_rows, old_columns = _grid_of(value.shape[1] - prefix, rows / columns)
    patches = interpolate_grid(value[:, prefix:], (old_rows, old_columns), (rows, columns))
    new = own.clone()
    kept = min(prefix, own_prefix)
    new[:, :kept] = value[:, :kept]
    new[:, own_prefix:] = patches
    return new, f"{old_rows}×{old_columns} to {rows}×{columns}"


def _grid_of(num_patches: int, aspect: float) -> tuple[int, int]:
    """(rows, columns) of a grid of which only the size is known: square if it can be, else nearest
    in shape to rows / columns = ``aspect``."""
    side = round(num_patches**0.5)
    if side * side == num_patches:
        return side, side
    shapes = [(r, num_patches // r) for r in range(1, num_patches + 1) if num_patches % r == 0]
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - aspect))


def interpolate_grid(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, rows·columns, D) embeddings of a grid, bicubically interpolated from the size ``old`` to
    ``new``: DeiT's way to finetune at another resolution (paper, section 3)."""
    if old == new:
        return x
    grid = x.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


# --- size ---------------------------------------------------------------------------------------


def wants_channels_last(model: nn.Module, asked: bool | None) -> bool:
    """Whether pictures and weights go channels-last: as ``asked``, None: if it is a CNN.

    Its convolutions look beyond one pixel several times; a transformer's do in the stem alone.
    """
    if asked is not None:
        return asked
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return len(spatial) > 4


@dataclass(frozen=True)
class ModelSummary:
    """``parameters`` in all, and multiply-accumulates of one picture."""

    parameters: int
    macs: int


def summarise(model: nn.Module, input_size: int) -> ModelSummary:
    """Count parameters, and the multiply-accumulates of one picture of ``input_size`` pixels.

    Counting runs on shapes alone where the model allows it. Raises OptionError if the model doesn't
    take pictures of that size.
    """
    try:
        macs = _count_macs(model, input_size, torch.device("meta"))
    except Exception:  # of any kind: the size is wrong, or the model can't do without real values
        try:
            macs = _count_macs(model, input_size, next(model.parameters()).device)
        except Exception as error:
            name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
            raise OptionError(
                "input_size", f"{input_size} doesn't fit {name}: {_first_line(error)}"
            ) from error
    return ModelSummary(sum(p.numel() for p in model.parameters()), macs)


def _count_macs(model: nn.Module, input_size: int, device: torch.device) -> int:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    tensors = {name: x.detach().to(device) for name, x in tensors.items()}
    picture = torch.zeros(1, 3, input_size, input_size, device=device)
    was_training = model.training
    model.eval()
    try:
        # Of the kinds of fused attention only the plain one is counted everywhere.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, tensors, (picture,))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2
