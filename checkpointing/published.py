"""Models with published weights: timm's, the Hugging Face hub's, and folders in timm's hub form.

=================================== ================================================================
``timm/NAME`` or ``timm/NAME.TAG``  a model of timm's, or of ours, with the weights timm publishes
``hf-hub:OWNER/NAME``               a repository on the hub, at a revision with ``@REVISION``
``torchvision/NAME``                a model of torchvision's; ``NAME.WEIGHTS`` names others of it
``transformers/OWNER/NAME``         a classifier of the transformers library, of the hub; or of a
                                    folder, ``transformers/FOLDER``
``FOLDER`` or ``local-dir:FOLDER``  ``config.json`` and ``model.safetensors`` or
                                    ``pytorch_model.bin``
=================================== ================================================================
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import errors as hub
from torch import Tensor, nn

import models
from architectures.factory import has_published_weights, published_cfg
from architectures.hub import FOLDER, HUB, reached
from architectures.libraries import description, library_of
from architectures.library_model import LIBRARIES
from architectures.weights import load_pretrained_weights
from checkpointing.digest import check_safetensors
from checkpointing.sharded import REST
from errors import CheckpointError, OptionError, first_line, first_names

TIMM = "timm/"


class Published(NamedTuple):
    """A model that is published."""

    name: str
    """By which ``models.build_model`` builds it."""
    weights: dict[str, Tensor]
    """Its state dict, on the CPU."""
    cfg: dict[str, Any]
    """timm's ``pretrained_cfg``: classes, input size, crop, interpolation, mean, std …"""
    description: dict[str, Any] | None
    """What rebuilds the model without the place that it came from: ``architectures.hub``."""


def is_published(source: str | Path) -> bool:
    """Whether ``source`` names a published model; a file or folder of that name goes first."""
    source = str(source)
    path = Path(source).expanduser()
    if path.exists():
        return (path / "config.json").is_file() and not (path / REST).is_file()
    return source.startswith((TIMM, HUB, FOLDER, *LIBRARIES))


def short_name(source: str | Path) -> str:
    """The last part of a published model's name, which may be a file's: "resnet50.a1_in1k"."""
    return Path(str(source).removeprefix(HUB).removeprefix(FOLDER)).name.partition("@")[0]


def classes_of(cfg: Mapping[str, Any]) -> int:
    """The number of classes that published weights know; 0 where their outputs are none.

    The image towers of CLIP and its kin give embeddings, whose width timm calls the number of
    classes.
    """
    count, name = cfg["num_classes"], f"{cfg['architecture']}.{cfg.get('tag')}"
    embeds = count in _EMBEDDINGS and _CLIP.search(name) and not cfg.get("label_names")
    return 0 if embeds else count


_EMBEDDINGS = (384, 512, 640, 768, 1024, 1152, 1280)
_CLIP = re.compile(r"clip|openai|fastvit_mci|vitamin|vit_pe_core")


def label_names(cfg: Mapping[str, Any]) -> list[str] | None:
    """The class names in a ``pretrained_cfg``, in order; None where it has none.

    Raises CheckpointError where they are not one for each class.
    """
    count, given = cfg["num_classes"], cfg.get("label_names")
    if not given:
        return None
    if not isinstance(given, Mapping | list | tuple):
        raise CheckpointError(f"the label_names in its config.json are a {type(given).__name__}")
    if isinstance(given, Mapping):  # by number, which may have gaps
        given = [given.get(str(i), f"class {i}") for i in range(count)]
    if len(given) != count:
        raise CheckpointError(
            f"{cfg['architecture']} has {count} classes and {len(given)} label_names: correct them "
            "in its config.json"
        )
    return list(map(str, given))


def read_published(source: str | Path) -> Published:
    """A published model with its weights, which timm downloads once.

    Raises CheckpointError, in one line with the way out, where there is no such model, it has no
    weights or no classifier, or it can't be fetched or read.
    """
    cfg: dict[str, Any] = {"hf_hub_id": str(source).removeprefix(HUB)}
    try:
        name = name_for_timm(str(source))
        weights = Path(name.removeprefix(FOLDER)) / "model.safetensors"
        if name.startswith(FOLDER) and weights.is_file():
            check_safetensors(weights)
        cfg = published_cfg(name)
        _refuse_what_cannot_classify(name, cfg)
        model = _with_weights(name, cfg)
    except Exception as error:  # timm and torch raise many types for files that aren't as expected
        cause = error.__cause__ if isinstance(error, OptionError) and error.__cause__ else error
        raise CheckpointError(f"{source}: {_reason(cause, cfg)}") from None
    return Published(name, model.state_dict(), cfg | model.pretrained_cfg, description(name))


def _with_weights(name: str, cfg: Mapping[str, Any]) -> nn.Module:
    if (library := library_of(name)) is None:
        with reached(name):
            return timm.create_model(name, pretrained=True)
    model = library.build(name, cfg["num_classes"], {})
    load_pretrained_weights(model, library.published_weights(name))
    return model


def name_for_timm(source: str) -> str:
    """The name by which timm's ``create_model`` finds a published model.

    Raises OptionError or CheckpointError, without the source, where there can be none.
    """
    path = Path(source.removeprefix(FOLDER)).expanduser()
    if path.is_dir():
        return FOLDER + str(path.resolve())
    if source.startswith(FOLDER):
        raise CheckpointError("there is no such folder")
    if source.startswith(HUB):
        return source
    name = models.resolve_name(source.removeprefix(TIMM))
    if name.startswith(LIBRARIES):
        return name
    architecture, dot, tag = name.partition(".")
    tags = [c.tag for c in timm.models.get_arch_pretrained_cfgs(architecture).values() if c.tag]
    if dot and tag not in tags:
        known = f"its tags are {first_names(tags, 8)}" if tags else "it has none"
        raise CheckpointError(f"no weights of {architecture} have the tag {tag!r}; {known}")
    return name


def _refuse_what_cannot_classify(name: str, cfg: Mapping[str, Any]) -> None:
    if not has_published_weights(cfg):
        raise CheckpointError(f"no weights of {name} are published: train it, or name a checkpoint")
    if not classes_of(cfg):
        raise CheckpointError(
            f"{name} has no classifier, only features: fine-tune it first "
            f"(main.py --model {name} --pretrained)"
        )


def _reason(error: BaseException, cfg: Mapping[str, Any]) -> str:
    """Why a model can't be had, and the way out."""
    owner = "log in with the token of an account that may read it (hf auth login)"
    if isinstance(error, hub.GatedRepoError):
        return f"its owner grants access to it one by one: ask on its page, then {owner}"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"the hub knows no such model, or it is private: check the name, or {owner}"
    if isinstance(error, hub.RevisionNotFoundError):
        return "it has no such revision: take a branch, tag or commit of its page"
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        return "it isn't in timm's hub form (no config.json, or no weights): name another"
    if isinstance(error, hub.HFValidationError):
        return f"{first_line(error)}; expected {HUB}OWNER/NAME"
    if isinstance(error, KeyError):
        return f"it isn't in timm's hub form: its config.json has no {error}"
    if isinstance(error, json.JSONDecodeError):
        return f"its config.json can't be read: {error}"
    if isinstance(error, OSError):
        return f"it can't be fetched ({first_line(error.__cause__ or error)}): {_by_hand(cfg)}"
    if isinstance(error, OptionError):
        return error.message
    if str(error).startswith("Unknown model"):
        return "its architecture isn't known here: --plugin FILE, which registers it"
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return lines[1] if lines[0].startswith("Error(s) in loading") and lines[1:] else lines[0]


def _by_hand(cfg: Mapping[str, Any]) -> str:
    """How to get the weights on another machine."""
    repository, _, revision = (cfg.get("hf_hub_id") or "").partition("@")
    if repository:
        at = f" --revision {revision}" if revision else ""
        return (
            "where there is a network, hf download "
            f"{repository}{at} --local-dir FOLDER; then name the FOLDER"
        )
    return f"put {cfg.get('url')} into {torch.hub.get_dir()}/checkpoints"
