"""Any model by name, built by timm."""

import contextlib
import logging
from collections.abc import Collection, Mapping
from typing import Any

import timm
import timm.models
from huggingface_hub import hf_hub_url
from timm.models.naflexvit import NaFlexVit
from torch import nn

from architectures.arguments import takes_argument
from architectures.hub import FOLDER, HUB, for_timm, reached, read_config
from architectures.registry import ALIASES, plain_cfg
from architectures.weights import load_pretrained_weights
from errors import OptionError, did_you_mean, first_line

log = logging.getLogger(__name__)

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
    "local-dir:FOLDER"). "timm/" in front, as in the names of published models, goes. Raises
    OptionError with the nearest names for an unknown one.
    """
    if name.startswith((HUB, FOLDER)):
        return name
    architecture, dot, tag = name.removeprefix("timm/").partition(".")
    resolved = ALIASES.get(architecture.lower(), architecture) + dot + tag
    if timm.is_model(resolved):
        return resolved
    known = [*ALIASES, *timm.list_models()]
    hint = did_you_mean(name, known, most=3, otherwise="timm.list_models() lists them")
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
    """A model by name, for square images of ``input_size`` pixels.

    ``required`` are the options asked for, as opposed to defaults: a model that doesn't take one of
    those raises OptionError, a default it doesn't take is left out with a note in the log. A model
    without an ``img_size`` takes images of any size. ``pretrained`` starts from the weights timm
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
    if isinstance(model, NaFlexVit):
        log.info(
            "%s takes square images of one size here, as a ViT does: batches of patches in varying "
            "numbers (timm's NaFlex loader) are not made",
            name,
        )
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
    try:
        with reached(name) if name.startswith(HUB) else contextlib.nullcontext():
            for option in list(values):
                if not takes_argument(for_timm(name)[0], _ARGUMENTS[option], num_classes):
                    _leave_out(option, values.pop(option), name, required)
            return _timm_model(name, num_classes, values)
    except (ValueError, AssertionError) as error:
        if "input_size" not in values:
            raise
        # The size is to blame if the model can be built without it.
        others = {option: value for option, value in values.items() if option != "input_size"}
        _create(name, num_classes, others, required)
        message = f"{name} can't be built for {values['input_size']} pixels"
        raise OptionError("input_size", f"{message} ({first_line(error)})") from error
    except OSError as error:
        raise OptionError("model", f"{name} can't be fetched ({first_line(error)})") from error


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
    name, described = for_timm(name)
    return timm.create_model(name, num_classes=num_classes, **{**described, **arguments, **kwargs})


def _complete_cfg(model: nn.Module, name: str) -> None:
    """Give ``model`` a ``pretrained_cfg`` (a model of a plugin may have none) without gaps."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = plain_cfg(224, "head") | {"architecture": name} | cfg


def _with_published_weights(
    model: nn.Module, name: str, num_classes: int, values: Mapping[str, Any]
) -> nn.Module:
    """``model`` with the weights timm publishes for it; raises OptionError where there are none, or
    where they don't fill it."""
    cfg = model.pretrained_cfg
    if not has_published_weights(cfg):
        raise OptionError("pretrained", f"no weights of {name} are published: leave it out")
    try:
        # Of their own classes timm demands that they are complete.
        with reached(name):
            published = _timm_model(name, cfg["num_classes"], values, pretrained=True)
    except (OSError, RuntimeError) as error:
        if str(error).startswith("Error(s) in loading"):
            reason = str(error).splitlines()[1].strip()
            hint = ": leave --input-size out" if "size mismatch" in str(error) else ""
            message = f"the weights of {name} don't fill the model ({reason}){hint}"
            raise OptionError("pretrained", message) from error
        raise OptionError(
            "pretrained",
            f"the weights of {name} couldn't be fetched ({first_line(error)}): get "
            f"{_address(cfg)} on a machine with a network and use --no-pretrained --finetune FILE",
        ) from error
    if cfg["num_classes"] == num_classes:
        _complete_cfg(published, name)
        return published
    log.info("%s: %s", name, load_pretrained_weights(model, published.state_dict()).summary())
    return model


def _address(cfg: Mapping[str, Any]) -> str:
    """Where the weights of a ``pretrained_cfg`` are."""
    repository, _, revision = (cfg.get("hf_hub_id") or "").partition("@")
    if not repository:
        return cfg.get("url") or "the file"
    file = cfg.get("hf_hub_filename") or "model.safetensors"
    return hf_hub_url(repository, file, revision=revision or None)


def published_cfg(name: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of a model by name, which isn't built; without gaps.

    Raises OptionError for an unknown model, or one whose configuration can't be fetched.
    """
    name = resolve_name(name)
    try:
        if (config := read_config(name)) is not None:
            found = config[0]
        else:
            cfg = timm.get_pretrained_cfg(name)
            found = cfg.to_dict() if cfg else {}
    except OSError as error:
        raise OptionError("model", f"{name} can't be fetched ({first_line(error)})") from error
    return plain_cfg(224, "head") | {"architecture": name} | found


def has_published_weights(cfg: Mapping[str, Any]) -> bool:
    """Whether timm's ``pretrained_cfg`` of a model says where weights are."""
    return any(cfg.get(place) for place in ("hf_hub_id", "url", "file", "state_dict"))
