"""Any model by name, built by timm."""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import timm
import timm.models
from huggingface_hub import hf_hub_url
from timm.models.naflexvit import NaFlexVit
from torch import nn

from architectures.arguments import argument_names, takes_argument
from architectures.first_conv import COLOURS
from architectures.hub import FOLDER, HUB, for_timm, given_description, reached, read_config
from architectures.libraries import library_of
from architectures.library_model import LIBRARIES, TRANSFORMERS
from architectures.registry import ALIASES, plain_cfg
from architectures.sizes import ImageSize, size_text
from architectures.variant import PLAIN, Variant
from architectures.weights import load_pretrained_weights
from errors import (
    CheckpointError,
    OptionError,
    UserError,
    did_you_mean,
    first_line,
    first_names,
    printable,
    shortened,
    shown,
)

log = logging.getLogger(__name__)

# Our options and the arguments by which timm's models know them.
_ARGUMENTS = {
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
    "input_size": "img_size",
    "in_chans": "in_chans",
}


def resolve_name(name: str) -> str:
    """The name timm knows for ``name``: short names and CaiT in any case are allowed.

    A tag of timm's ("resnet50.a1_in1k") stays, and so do its sources ("hf-hub:OWNER/NAME",
    "local-dir:FOLDER"). "timm/" in front, as in the names of published models, goes. Raises
    OptionError with the nearest names for an unknown one.
    """
    if name.startswith((HUB, FOLDER)):
        return name
    if (library := library_of(name)) is not None:
        return library.resolve(name)
    architecture, dot, tag = name.removeprefix("timm/").partition(".")
    resolved = ALIASES.get(architecture.lower(), architecture) + dot + tag
    if timm.is_model(resolved):
        return resolved
    known = [*ALIASES, *timm.list_models(), *LIBRARIES]
    hint = did_you_mean(name, known, most=3, otherwise="timm.list_models() lists them")
    raise OptionError("model", f"unknown model {name!r}: {hint}")


def build_model(
    name: str,
    num_classes: int,
    *,
    input_size: ImageSize = 224,
    in_chans: int = 3,
    drop: float = 0.0,
    drop_path: float = 0.0,
    drop_block: float | None = None,
    pretrained: bool = False,
    grad_checkpointing: bool = False,
    required: Collection[str] = (),
    variant: Variant = PLAIN,
) -> nn.Module:
    """A model by name, for images of ``input_size`` pixels: a square's side, or height and width.

    ``required`` are the options asked for, as opposed to defaults: a model that doesn't take one of
    those raises OptionError, a default it doesn't take is left out with a note in the log. A model
    without an ``img_size`` takes images of any size. One that can't have ``in_chans`` other than 3
    raises OptionError. ``pretrained`` starts from the weights timm publishes; position embeddings,
    the first convolution and the head are fitted. Every model built has a
    ``pretrained_cfg`` with mean, std, crop_pct and interpolation. A ``variant`` has further
    arguments, all of which the model must take.
    """
    name = resolve_name(name)
    values = {
        "drop": drop,
        "drop_path": drop_path,
        "drop_block": drop_block,
        "input_size": input_size,
    }
    values = {option: value for option, value in values.items() if value is not None}
    if in_chans != COLOURS:
        values["in_chans"] = in_chans
    with _from_elsewhere(name):
        with contextlib.suppress(OSError):  # said where the model is built
            read_config(name)  # refuses what would take hours to build
        model = _create(name, num_classes, values, required, variant)
        _complete_cfg(model, name)
    if isinstance(model, NaFlexVit):
        log.info(
            "%s takes square images of one size here, as a ViT does: batches of patches in varying "
            "numbers (timm's NaFlex loader) are not made",
            name,
        )
    if "input_size" in values and "input_size" not in required:
        native, built = (size_text(s) for s in (model.pretrained_cfg["input_size"][1:], input_size))
        if native != built:
            log.warning(
                "%s is meant for %s pixels and built for %s: see --input-size", name, native, built
            )
    if pretrained:
        model = _with_published_weights(model, name, num_classes, values, variant)
    variant.set_batch_norm(model, name)
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise OptionError("grad_checkpointing", f"{name} has none: leave it out") from None
    return model


@contextlib.contextmanager
def _from_elsewhere(name: str) -> Iterator[None]:
    """Inside, what somebody else's ``config.json`` says is read, or built, which may be anything.

    Raises OptionError where that can't be done.
    """
    if not name.startswith((HUB, FOLDER, TRANSFORMERS)) or given_description(name) is not None:
        yield
        return
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # timm and transformers hand it on to any class
        reason = printable(shortened(f"{type(error).__name__}: {first_line(error)}"))
        raise OptionError(
            "model", f"{name} can't be built as its config.json says ({reason}): correct that file"
        ) from error


def _create(
    name: str,
    num_classes: int,
    values: dict[str, Any],
    required: Collection[str],
    variant: Variant,
) -> nn.Module:
    """Build ``name`` with the options in ``values`` that it takes, and remove the others there."""
    try:
        with reached(name) if name.startswith(HUB) else contextlib.nullcontext():
            for option in list(values):
                if not _takes(name, _ARGUMENTS[option], num_classes, values[option]):
                    _leave_out(option, values.pop(option), name, required)
            if variant.keywords:
                return _variant_model(name, num_classes, values, variant)
            return _named_model(name, num_classes, values)
    except (ValueError, AssertionError) as error:
        if "input_size" not in values:
            raise
        # The size is to blame if the model can be built without it.
        others = {option: value for option, value in values.items() if option != "input_size"}
        _create(name, num_classes, others, required, variant)
        message = f"{name} can't be built for {size_text(values['input_size'])} pixels"
        raise OptionError("input_size", f"{message} ({first_line(error)})") from error
    except OSError as error:
        raise OptionError("model", f"{name} can't be fetched ({first_line(error)})") from error


def _leave_out(option: str, value: float, name: str, required: Collection[str]) -> None:
    """Say that ``name`` doesn't take ``option``, unless that changes nothing."""
    if option == "input_size" or not value:  # without img_size a model takes any size
        return
    message = f"{name} takes no {_ARGUMENTS[option]}"
    if option in (*required, "in_chans"):
        raise OptionError(option, f"{message}: leave it out")
    log.info("%s: --%s is left out", message, option.replace("_", "-"))


def _takes(name: str, argument: str, num_classes: int, value: Any) -> bool:
    """Whether the model takes the keyword ``argument``, which would be ``value``."""
    if (library := library_of(name)) is not None:
        return library.takes(name, argument, value)
    return takes_argument(for_timm(name)[0], argument, num_classes)


def _variant_model(
    name: str, num_classes: int, values: Mapping[str, Any], variant: Variant
) -> nn.Module:
    """The model with the keywords of ``variant``. Raises OptionError for one it doesn't take, or a
    value that it can't be built with."""
    for keyword, value in variant.keywords.items():
        option = variant.option_of(keyword)
        if value is None:
            message = f"{keyword}=none means the model's own value: leave it out"
            raise OptionError(option, message)
        if not _takes(name, keyword, num_classes, value):
            if option != "model_kwargs":
                raise OptionError(option, f"{name} takes no {keyword}: leave it out")
            known = _keyword_names(name, num_classes)
            hint = did_you_mean(keyword, known, most=3, otherwise=f"it takes {first_names(known)}")
            raise OptionError(option, f"{name} takes no {keyword!r}: {hint}")
    try:
        return _named_model(name, num_classes, values, **variant.keywords)
    except (OSError, OptionError):
        raise
    except Exception as error:  # a class fails at values of another kind in any way
        _named_model(name, num_classes, values)  # the keywords are to blame if this works
        pairs = ", ".join(f"{key}={shown(value)}" for key, value in variant.keywords.items())
        option = "model_kwargs" if variant.arguments else "global_pool"
        raise OptionError(
            option, f"{name} can't be built with {pairs} ({first_line(error)})"
        ) from error


def _keyword_names(name: str, num_classes: int) -> list[str]:
    if (library := library_of(name)) is not None:
        return library.keyword_names(name)
    return argument_names(for_timm(name)[0], num_classes)


def _named_model(
    name: str, num_classes: int, values: Mapping[str, Any], **kwargs: Any
) -> nn.Module:
    arguments = {_ARGUMENTS[option]: value for option, value in values.items()}
    if (library := library_of(name)) is not None:
        return library.build(name, num_classes, arguments | kwargs)
    name, own = for_timm(name)
    return timm.create_model(name, num_classes=num_classes, **{**own, **arguments, **kwargs})


def _complete_cfg(model: nn.Module, name: str) -> None:
    """Give ``model`` a ``pretrained_cfg`` (a model of a plugin may have none) without gaps."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = plain_cfg(224, "head") | {"architecture": name} | cfg


def _with_published_weights(
    model: nn.Module, name: str, num_classes: int, values: Mapping[str, Any], variant: Variant
) -> nn.Module:
    """``model`` with the weights timm publishes for it; raises OptionError where there are none, or
    where they don't fill it."""
    cfg = model.pretrained_cfg
    if not has_published_weights(cfg):
        raise OptionError("pretrained", f"no weights of {name} are published: leave it out")
    try:
        # Of their own classes timm demands that they are complete.
        with reached(name):
            if (library := library_of(name)) is not None:
                weights = library.published_weights(name)
                log.info("%s: %s", name, load_pretrained_weights(model, weights).summary())
                return model
            published = _published_model(name, cfg, values, variant)
    except CheckpointError as error:
        raise OptionError("pretrained", f"the weights of {name}: {error}") from None
    except (OSError, RuntimeError) as error:
        if str(error).startswith("Error(s) in loading"):
            reason = str(error).splitlines()[1].strip()
            hint = ""
            if "size mismatch" in str(error):
                native = size_text(cfg["input_size"][1:]).replace("×", " ")
                hint = f": leave --input-size out, or --input-size {native}"
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


def _published_model(
    name: str, cfg: Mapping[str, Any], values: Mapping[str, Any], variant: Variant
) -> nn.Module:
    """The model with timm's weights for its own classes, of the size in ``values``.

    Where timm can't fit the weights to the size, they are taken from the model of their own.
    """
    build = partial(_named_model, name, cfg["num_classes"], **variant.keywords)
    try:
        return build(values, pretrained=True)
    except RuntimeError as error:
        if "size mismatch" not in str(error) or "input_size" not in values:
            raise
        native = cfg["input_size"][1:]
        weights = build({**values, "input_size": native}, pretrained=True).state_dict()
        model = build(values)
        log.info("%s: %s", name, load_pretrained_weights(model, weights, size=native).summary())
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
        if (library := library_of(name)) is not None:
            with _from_elsewhere(name):
                found = library.published_cfg(name)
        elif name.startswith((HUB, FOLDER)):
            with _from_elsewhere(name):
                found = read_config(name)[0]
        else:
            cfg = timm.get_pretrained_cfg(name)
            found = cfg.to_dict() if cfg else {}
    except OSError as error:
        raise OptionError("model", f"{name} can't be fetched ({first_line(error)})") from error
    return plain_cfg(224, "head") | {"architecture": name} | found


def has_published_weights(cfg: Mapping[str, Any]) -> bool:
    """Whether timm's ``pretrained_cfg`` of a model says where weights are."""
    return any(cfg.get(place) for place in ("hf_hub_id", "url", "file", "state_dict"))
