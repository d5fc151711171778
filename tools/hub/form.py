"""A model as timm's own architecture with arguments, so that timm alone can build it.

DeiT, DeiT III, CaiT and ResMLP of this project have the weights of timm's models under the names of
facebookresearch/deit.
"""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from architectures.arguments import takes_argument
from architectures.library_model import LibraryModel
from cait_models import TIMM_NAMES
from errors import UserError

State = Mapping[str, Tensor]
_SIZES = {192: "tiny", 384: "small", 768: "base"}
# A family is told by a tensor of its models; the first that fits. timm's models of it by width and
# depth.
_FAMILIES: tuple[tuple[Callable[[State], bool], dict[tuple[int, int], str]], ...] = (
    (
        lambda state: "blocks_token_only.0.norm1.weight" in state,
        {
            (192, 24): "cait_xxs24_224",
            (288, 24): "cait_xs24_384",
            (384, 24): "cait_s24_224",
            (768, 36): "cait_m36_384",
        },
    ),
    (
        lambda state: "dist_token" in state,
        {(width, 12): f"deit_{size}_distilled_patch16_224" for width, size in _SIZES.items()},
    ),
    (
        lambda state: "blocks.0.norm11.weight" in state,
        {(384, 18): "vit_small_patch16_18x2_224", (768, 18): "vit_base_patch16_18x2_224"},
    ),
    (
        lambda state: "cls_token" in state and _class_token_has_position(state),
        {(width, 12): f"deit_{size}_patch16_224" for width, size in _SIZES.items()},
    ),
    (
        lambda state: "cls_token" in state and "pos_embed" in state,
        {
            (384, 12): "deit3_small_patch16_224",
            (512, 12): "deit3_medium_patch16_224",
            (768, 12): "deit3_base_patch16_224",
            (1024, 24): "deit3_large_patch16_224",
            (1280, 32): "deit3_huge_patch14_224",
        },
    ),
    (
        lambda state: "blocks.0.attn.weight" in state,
        {
            (384, 12): "resmlp_12_224",
            (384, 24): "resmlp_24_224",
            (384, 36): "resmlp_36_224",
            (768, 24): "resmlp_big_24_224",
        },
    ),
)
# The second norm, attention and MLP of a parallel block (FB's names), and timm's lists of them.
_PARALLEL = (
    (r"\.norm1(1?)\.", "attns", "norm."),
    (r"\.attn(1?)\.", "attns", "attn."),
    (r"\.gamma_1(_1)?$", "attns", "ls.gamma"),
    (r"\.norm2(1?)\.", "ffns", "norm."),
    (r"\.mlp(1?)\.", "ffns", "mlp."),
    (r"\.gamma_2(_1)?$", "ffns", "ls.gamma"),
)
# What a model raises that has some tensors of a family and is none of it.
_OTHER_ARCHITECTURE = (
    *(AssertionError, AttributeError, KeyError, RuntimeError, StopIteration),
    *(TypeError, ValueError),
)
_OTHERWISE = "export it as onnx or safetensors"
_SAME = 1e-4  # largest difference of a logit of order 1, as tools.export has it


class HubForm(NamedTuple):
    """What timm needs to build a model again."""

    architecture: str
    """The name for ``timm.create_model``."""
    model_args: dict[str, Any]
    """Its arguments, as JSON has them."""
    model: nn.Module
    """Holds the weights under the architecture's names."""
    needs: str
    """The module that registers the architecture; empty: it is timm's own."""


def timms_own(architecture: str) -> Callable[..., nn.Module] | None:
    """timm's function for an architecture, also where this project registers its own instead."""
    return getattr(timm.models, architecture, None)


def hub_form(model: nn.Module, images: Tensor) -> HubForm:
    """``model`` as timm's architecture where there is an equal one, else under its own name.

    Args:
        model: on the CPU, in evaluation mode, with a ``pretrained_cfg``.
        images: (N, 3, H, W); equal is what gives the same logits for them.

    Raises:
        UserError: the form can't hold it, for it is another library's, or has another epsilon of
            batch norm than the architecture.
    """
    if isinstance(model, LibraryModel):
        raise UserError(
            f"the hub form is timm's, without torchvision's and transformers' models: {_OTHERWISE}"
        )
    form = _form_of(model, images)
    if (own := _epsilons(model)) and own != _epsilons(_built(form)):
        raise UserError(f"the hub form can't hold another --bn-eps: {_OTHERWISE}")
    return form


def _built(form: HubForm) -> nn.Module:
    """The model with other weights, by timm's code where the architecture is timm's."""
    entry = timms_own(form.architecture) or model_entrypoint(form.architecture)
    return entry(num_classes=form.model.num_classes, **form.model_args)


def _epsilons(model: nn.Module) -> list[float]:
    return [module.eps for module in model.modules() if isinstance(module, _BatchNorm)]


def _form_of(model: nn.Module, images: Tensor) -> HubForm:
    architecture = model.pretrained_cfg["architecture"]
    entry = model_entrypoint(architecture) if timm.is_model(architecture) else None
    defined = type(model).__module__, getattr(entry, "__module__", "")
    if all(module.startswith("timm.") for module in defined):
        arguments = _arguments(model)
        if not takes_argument(architecture, "img_size"):
            # A plug-in's function that builds one of timm's models may have taken it.
            arguments.pop("img_size", None)
        return HubForm(architecture, arguments, model, "")
    if (form := _as_timms(model, images)) is not None:
        return form
    module = entry.__module__ if entry else type(model).__module__
    ours = module.partition(".")[0] in ("models", "cait_models", "architectures")
    return HubForm(architecture, _arguments(model), model, "models" if ours else module)


def _arguments(model: nn.Module) -> dict[str, Any]:
    """What ``timm.create_model`` was given, but for drop rates and the number of classes."""
    given = getattr(model, "_model_args", {})
    kept = {k: v for k, v in given.items() if "drop" not in k and k != "num_classes"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


# --- timm's twin of a model of ours ---------------------------------------------------------------


def _name_in_timm(model: nn.Module) -> str | None:
    """timm's model of the same family that is most like it."""
    architecture, state = model.pretrained_cfg["architecture"], model.state_dict()
    names = next((names for fits, names in _FAMILIES if fits(state)), None)
    if "patch_embed.proj.weight" not in state or names is None:
        return None
    same = TIMM_NAMES.get(architecture, architecture)
    width, depth = _shape(model)["embed_dim"], len(model.blocks)
    nearest = min(names, key=lambda other: (abs(other[0] - width), abs(other[1] - depth)))
    return same if timms_own(same) else names[nearest]


def _shape(model: nn.Module) -> dict[str, Any]:
    """The arguments of timm's classes that decide the shape of a model, ours or timm's."""
    state = model.state_dict()
    stem = next(
        x for name, x in state.items() if name.endswith(("embed.proj.weight", "stem.proj.weight"))
    )
    hidden = next(x for name, x in state.items() if re.search(r"^blocks\.0\..*fc1\.weight$", name))
    embed = getattr(model, "patch_embed", None) or model.stem
    shape = {
        "img_size": list(to_2tuple(embed.img_size)),
        "in_chans": stem.shape[1],
        "patch_size": stem.shape[-1],
        "embed_dim": stem.shape[0],
        "mlp_ratio": hidden.shape[0] / stem.shape[0],
    }
    heads = [m.num_heads for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)]
    if not heads:  # ResMLP
        return shape | {"num_blocks": len(model.blocks)}
    shape |= {"depth": len(model.blocks), "num_heads": heads[0]}
    shape["qkv_bias"] = any(name.endswith("qkv.bias") for name in state)
    if hasattr(model, "blocks_token_only"):
        return shape | {"depth_token_only": len(model.blocks_token_only)}
    if not _class_token_has_position(state):
        shape["no_embed_class"] = True
        scaled = any("gamma" in name for name in state)
        shape["init_values"] = 1e-6 if scaled else 0.0  # 0: no LayerScale
    return shape


def _class_token_has_position(state: State) -> bool:
    """Whether there are more positions than patches, which form a square."""
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    return round(positions**0.5) ** 2 != positions


def _as_timms(model: nn.Module, images: Tensor) -> HubForm | None:
    """timm's model that has the weights and the logits of ``model``, if there is one."""
    try:
        name = _name_in_timm(model)
        if name is None:
            return None
        own, shape = timms_own(name), _shape(model)
        with torch.device("meta"):
            plain = _shape(own())
        arguments = {k: v for k, v in shape.items() if k == "img_size" or plain.get(k) != v}
        with torch.device("meta"):  # its values are replaced: spares the time of drawing them
            twin = own(num_classes=model.num_classes, **arguments).eval()
        filter_fn = sys.modules[own.__module__].checkpoint_filter_fn
        twin.load_state_dict(filter_fn(_renamed(model.state_dict()), twin), assign=True)
        with torch.no_grad():
            wanted, given = model(images), twin(images)
    except _OTHER_ARCHITECTURE:
        return None
    same = (given - wanted).abs().max() <= _SAME * max(1.0, float(wanted.abs().max()))
    return HubForm(name, arguments, twin, "") if same else None


def _renamed(state: State) -> dict[str, Tensor]:
    """``state`` under timm's names where timm's filters alone don't translate them: DeiT III's."""
    if "cls_token" not in state or "blocks_token_only.0.norm1.weight" in state:
        return dict(state)
    parallel = "blocks.0.norm11.weight" in state
    return {
        _in_lists(key) if parallel else re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", key): value
        for key, value in state.items()
    }


def _in_lists(key: str) -> str:
    """timm's name of a tensor of a parallel block."""
    for pattern, kind, part in _PARALLEL:
        if found := re.search(pattern, key):
            which = 1 if found[1] else 0
            return f"{key[: found.start()]}.{kind}.{which}.{part}{key[found.end() :]}"
    return key
