"""The Hugging Face hub: asked for what a user named, and where there is a network.

A file may name a model of the hub too. Reading a file opens no connection: such a model is built by
the description that the file brings, or by what is in the hub's cache.
"""

import contextlib
import logging
import math
import os
import re
import socket
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants
from timm.models._hub import load_model_config_from_path

import bounded
from architectures.library_model import TRANSFORMERS
from errors import CheckpointError, UserError, first_line, printable, shortened, shown

# Of a description: more would take a lot of time and memory to build.
MOST_LAYERS = 300
MOST_NUMBER = 100_000
MOST_CONFIG = 16 << 20  # bytes of a config.json; names of 20,000 classes take one
HUB = "hf-hub:"
FOLDER = "local-dir:"

# Names of models that no one but a file gave, and descriptions by name.
_unasked: ContextVar[frozenset[str]] = ContextVar("unasked", default=frozenset())
_descriptions: ContextVar[Mapping[str, Mapping[str, Any]]] = ContextVar(
    "descriptions", default=MappingProxyType({})
)
# What timm's configurations say of places to load from: a description has none.
_PLACES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
_TEXTS = ("label_names", "label_descriptions", "description", "tags")
# What timm.create_model takes beside the arguments of the model.
_OF_TIMM = ("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_OF_TIMM += ("checkpoint_path", "scriptable", "exportable", "no_jit", "num_classes")


@contextlib.contextmanager
def built_by(name: str, description: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, the model ``name`` is built by a :func:`description`, unless that is None.

    Raises CheckpointError for one that can't be built.
    """
    if description is None:
        yield
        return
    parts = [description.get(part) for part in ("architecture", "model_args", "pretrained_cfg")]
    if not isinstance(parts[0], str) or not all(isinstance(p, Mapping) for p in parts[1:]):
        raise CheckpointError("its hub_config is none that this project writes")
    if not (timm.is_model(parts[0]) or name.startswith(TRANSFORMERS)):
        architecture = printable(shortened(parts[0]))
        raise CheckpointError(
            f"its architecture {architecture} isn't known here: --plugin FILE, which registers it"
        )
    refuse_enormous(parts[1], "hub_config")
    with _set(_descriptions, {**_descriptions.get(), name: description}):
        try:
            yield
        except (UserError, OSError):
            raise
        except Exception as error:  # timm takes any arguments, and fails at them in any way
            raise CheckpointError(
                f"its hub_config can't be built: {printable(shortened(first_line(error)))}"
            ) from None


def refuse_enormous(arguments: Mapping[str, Any], entry: str) -> None:
    """Raise CheckpointError if a file's ``entry`` asks for a model that takes a lot of time and
    memory to build."""
    for argument, value in arguments.items():
        # Tables of blocks (block_args, block_cfg) hold widths too.
        layers = re.search("depth|layer|stage|block(?!_args|_cfg)", argument)
        most = MOST_LAYERS if layers else MOST_NUMBER
        if not _total(value) <= most:
            raise CheckpointError(
                f"its {entry} asks for {printable(shown(argument))} of more than {most:,}"
            )


def given_description(name: str) -> Mapping[str, Any] | None:
    """The description by which ``name`` is built here, if any."""
    return _descriptions.get().get(name)


def unasked(names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """Inside, the network isn't asked for the models ``names``: HF_HUB_OFFLINE=0 allows it."""
    return _set(_unasked, _unasked.get() | set(names))


def _total(value: Any) -> float:
    """The sum of all numbers in ``value``, at any depth."""
    if isinstance(value, Mapping):
        return sum(map(_total, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_total, value))
    if not isinstance(value, int | float):
        return 0.0
    return float(abs(value)) if abs(value) < 1e300 else math.inf  # int has no greatest value


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def for_timm(name: str) -> tuple[str, dict[str, Any]]:
    """The name and arguments by which ``timm.create_model`` builds ``name``: its own, or those of
    its description."""
    found = _descriptions.get().get(name)
    if found is None:
        return name, {}
    arguments = {k: v for k, v in found["model_args"].items() if k not in _OF_TIMM}
    return found["architecture"], {**arguments, "pretrained_cfg": _without_places(found)}


def description(name: str) -> dict[str, Any] | None:
    """What rebuilds a model of one of timm's sources without that source, as plain values.

    It holds "architecture", "model_args" and "pretrained_cfg", as timm's ``config.json`` does. Read
    from the hub's cache, where building the model left it. None for another model's ``name``, and
    where it is gone.
    """
    if name in _descriptions.get():
        return dict(_descriptions.get()[name])
    with unasked([name]), contextlib.suppress(OSError):
        if found := read_config(name):
            cfg, architecture, arguments = found
            values = {"architecture": architecture, "pretrained_cfg": cfg}
            cfg = _without_places(values)
            return {"architecture": architecture, "model_args": arguments, "pretrained_cfg": cfg}
    return None


def read_config(name: str) -> tuple[dict[str, Any], str, dict[str, Any]] | None:
    """timm's configuration of a model of one of its sources, its architecture and its arguments.

    None for another model's ``name``. Raises OSError, and CheckpointError for a model that would
    take a lot of time and memory to build; what timm raises for an odd file may be anything.
    """
    if (found := _descriptions.get().get(name)) is not None:
        return _without_places(found), found["architecture"], dict(found["model_args"])
    if name.startswith(HUB):
        with reached(name):
            config = timm.models.load_model_config_from_hf(name.removeprefix(HUB))
    elif name.startswith(FOLDER):
        bounded.check(Path(name.removeprefix(FOLDER)) / "config.json", MOST_CONFIG)
        config = load_model_config_from_path(name.removeprefix(FOLDER))
    else:
        return None
    refuse_enormous(config[2] or {}, "config.json")
    count = config[0].get("num_classes", 0)
    if type(count) is not int or not 0 <= count <= MOST_NUMBER:
        raise CheckpointError(
            f"its config.json says num_classes {printable(shown(count))}: it must be a whole "
            f"number up to {MOST_NUMBER:,}"
        )
    return config


def _without_places(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found["pretrained_cfg"].items() if k not in (*_PLACES, *_TEXTS)}


@contextlib.contextmanager
def reached(name: str) -> Iterator[None]:
    """Inside, files of the hub are fetched or come from its cache, for the model ``name``.

    Its client tries for half a minute, and shows every try, where its host has no address. There
    the cache alone is asked, and OSError says what is the matter; so it is for a model that only a
    file names.
    """
    host = urlsplit(constants.ENDPOINT).hostname or ""
    closed = name in _unasked.get() and not _allowed()
    here = constants.HF_HUB_OFFLINE or closed or name.startswith(FOLDER)
    here = here or name in _descriptions.get()
    here = here or os.path.isdir(name.removeprefix(TRANSFORMERS))
    problem = "" if here else _no_address(host)
    before = constants.HF_HUB_OFFLINE
    messages = logging.getLogger("huggingface_hub.utils._http")
    level = messages.level
    messages.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = before or closed or bool(problem)
    try:
        yield
    except OSError:
        if closed:
            repository = name.removeprefix(HUB).removeprefix(TRANSFORMERS).partition("@")[0]
            raise OSError(
                "only a file names it, so the hub isn't asked: put HF_HUB_OFFLINE=0 in front of "
                f"the command, or once hf download {repository} config.json"
            ) from None
        if not problem:
            raise
        raise OSError(f"{host} can't be reached, {problem}, and nothing is cached") from None
    finally:
        messages.setLevel(level)
        constants.HF_HUB_OFFLINE = before


def _allowed() -> bool:
    """Whether the user says that the hub may be asked for anything."""
    return "HF_HUB_OFFLINE" in os.environ and not constants.HF_HUB_OFFLINE


def _no_address(host: str) -> str:
    """Why a host can't be found; empty where it can, or where a proxy would."""
    if urllib.request.getproxies():
        return ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return error.strerror or str(error)
    return ""
