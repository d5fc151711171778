"""Weights of torchvision's models by the names that timm has for the same.

Of ViT, Swin, Swin V2, ConvNeXt, RegNet, EfficientNet, MobileNetV2 and MNASNet, which compute the
same in both libraries, the larger EfficientNets with ``--bn-eps 0.001``. Others are for
``--model torchvision/NAME``: some differ in more than names, as MobileNetV3 does. (timm itself
renames VGG's.)
"""

import re
from collections.abc import Collection, Mapping

from timm.layers import Conv2dSame
from torch import Tensor, nn

_Renaming = tuple[tuple[str, str], ...]
_VIT: _Renaming = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
_SWIN: _Renaming = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.([1357])\.(\d+)\.", r"layers.<\1>.blocks.\2."),
    (r"^features\.([246])\.", r"layers.<\1>.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)
_CONVNEXT: _Renaming = (
    (r"^features\.0\.", "stem."),
    (r"^features\.([1357])\.(\d+)\.", r"stages.<\1>.blocks.\2."),
    (r"^features\.([246])\.", r"stages.<\1>.downsample."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)
_REGNET: _Renaming = (
    (r"^stem\.0\.", "stem.conv."),
    (r"^stem\.1\.", "stem.bn."),
    (r"^trunk_output\.block(\d)\.block\d-(\d+)\.", r"s\1.b{\2}."),
    (r"\.proj\.0\.", ".downsample.conv."),
    (r"\.proj\.1\.", ".downsample.bn."),
    (r"\.f\.([abc])\.0\.", r".conv[\1].conv."),
    (r"\.f\.([abc])\.1\.", r".conv[\1].bn."),
    (r"\.f\.se\.", ".se."),
    (r"^fc\.", "head.fc."),
)
# A name that tells the family in torchvision, one that timm's model of it has, and the others.
_FAMILIES = (
    ("encoder.layers.encoder_layer_0.ln_1.weight", "blocks.0.attn.qkv.weight", _VIT),
    ("features.1.0.attn.relative_position_bias_table", "layers.0.blocks.0.attn.qkv.weight", _SWIN),
    ("features.1.0.attn.cpb_mlp.0.weight", "layers.0.blocks.0.attn.qkv.weight", _SWIN),
    ("features.1.0.layer_scale", "stages.0.blocks.0.conv_dw.weight", _CONVNEXT),
    ("trunk_output.block1.block1-0.proj.0.weight", "s1.b1.conv1.conv.weight", _REGNET),
)


# Of the models that are sequences of convolutions, the first.
_FIRST_CONVS = ("features.0.0.weight", "layers.0.weight")


def timm_names(
    model: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``weights`` by the names of ``model``, which has the tensors ``own``; as they are unless they
    are torchvision's and the model is timm's of the same family."""
    for theirs, ours, renaming in _FAMILIES:
        if theirs in weights and theirs not in own and ours in own:
            named = {_renamed(n, renaming): _shaped(n, x) for n, x in weights.items()}
            return _with_two_biases(named, own) if renaming is _SWIN else named
    if "conv_stem.weight" in own and any(name in weights for name in _FIRST_CONVS):
        return _by_order(model, weights, own) or dict(weights)
    return dict(weights)


def _with_two_biases(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Swin V2: torchvision has a bias for keys too, and computes with zeros in its place."""
    found = dict(weights)
    for name in weights:
        block = name.removesuffix("qkv.bias")
        if block != name and f"{block}q_bias" in own:
            found[f"{block}q_bias"], _, found[f"{block}v_bias"] = found.pop(name).chunk(3)
    return found


def lacking_epsilon(model: nn.Module, weights: Mapping[str, Tensor]) -> float | None:
    """The epsilon of batch norm that torchvision's ``weights`` want and ``model`` hasn't, where
    they would fit it with that one."""
    wanted = _epsilon(weights)
    norms = {m: m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    if not norms or set(norms.values()) == {wanted}:
        return None
    try:
        for norm in norms:
            norm.eps = wanted
        return wanted if _by_order(model, weights, model.state_dict()) else None
    finally:
        for norm, epsilon in norms.items():
            norm.eps = epsilon


def _by_order(
    model: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """EfficientNet, MobileNetV2 and MNASNet: the same layers, one after the other in both.

    Empty where a layer has another shape, or the models compute something else with it.
    """
    same_padding = any(isinstance(m, Conv2dSame) for m in model.modules())
    epsilons = {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    if same_padding or epsilons != {_epsilon(weights)}:
        return {}
    theirs = _layers(sorted(weights, key=_natural), {"classifier.1"})
    ours = _layers(own, {"classifier"})
    named = {}
    for old, new in zip(theirs, ours, strict=False):
        named |= {f"{old}.{end}": f"{new}.{end}" for end in ("weight", "bias", *_STATISTICS)}
    named |= {"classifier.1.weight": "classifier.weight", "classifier.1.bias": "classifier.bias"}
    found = {named.get(name, name): value for name, value in weights.items()}
    fits = len(theirs) == len(ours) and _body(found) == _body(own)
    return found if fits else {}


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _body(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of what doesn't depend on the channels, classes or age of a file."""
    others = ("conv_stem.weight", "classifier.weight", "classifier.bias")
    return {
        name: tuple(value.shape)
        for name, value in weights.items()
        if name not in others and not name.endswith("num_batches_tracked")
    }


def _layers(names: Collection[str], head: set[str]) -> list[str]:
    """The layers that have tensors of these ``names``, in order, without the ``head``."""
    return [n for n in dict.fromkeys(name.rpartition(".")[0] for name in names) if n not in head]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by with numbers in their order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _epsilon(weights: Collection[str]) -> float:
    """What torchvision's batch norm adds to the variance: 1e-3 in EfficientNet V2, which begins
    without squeeze and excitation, and in B5 and larger, whose second stage has five blocks."""
    if not any(".fc1." in name or ".block." in name for name in weights):
        return 1e-5
    first = "features.1.0.block.1.fc1.weight" in weights
    return 1e-5 if first and "features.2.4.block.0.0.weight" not in weights else 1e-3


def _renamed(name: str, renaming: _Renaming) -> str:
    for pattern, new in renaming:
        name = re.sub(pattern, new, name)
    # Of torchvision's list, blocks are at odd places and what joins the stages at even ones.
    name = re.sub(r"<(\d)>", lambda found: str(int(found[1]) // 2), name)
    name = re.sub(r"\{(\d+)\}", lambda found: str(int(found[1]) + 1), name)
    return re.sub(r"\[([abc])\]", lambda found: str("abc".index(found[1]) + 1), name)


def _shaped(name: str, value: Tensor) -> Tensor:
    """LayerScale (C, 1, 1) as (C,)."""
    return value.flatten() if name.endswith(".layer_scale") else value


def is_torchvisions(names: Collection[str]) -> bool:
    """Whether tensors of these ``names`` are of a classifier of torchvision's."""
    return any(
        name in names
        for name in (*_FIRST_CONVS, "stem.0.0.weight", *(family[0] for family in _FAMILIES))
    )
