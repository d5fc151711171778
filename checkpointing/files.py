"""Checkpoints: written atomically, read without running code, found again after a crash.

A checkpoint is one file of tensors and primitives, with a checksum of all its bytes
(``digest.py``); ``torch.load(..., weights_only=True)`` reads it:

=============== ====================================================================================
``model``       weights, under the published names
``model_ema``   their moving average, or None
``optimizer``, ``scaler``, ``schedule``, ``progress``, ``rng``   everything to go on exactly
``config``      the resolved options of the run
``class_names``, ``preprocessing``, ``metrics``   what a user of the model needs
``hub_config``  of a model from the hub or a folder: what builds it without them
``thresholds``, ``ema_thresholds``   of a multi-label run: each class's best one of validation
``split``       what ``--val-fraction`` held out: seed, numbers of the images, images to train on
``on_signal``   whether a signal asked for it; no rollback goes back to it
``bad_images``  "path: reason" of images that could not be read
``tracking``    of a run with ``--log-to``: its key, project and name in the trackers
``versions``    of torch, torchvision, timm and Python that wrote it
=============== ====================================================================================
"""

import argparse
import contextlib
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpointing import adapters, address
from checkpointing.archive import check_archive
from checkpointing.digest import SealedFile, check_safetensors, is_verified
from checkpointing.form import FORMS, wrong_form
from checkpointing.recognise import what_it_is
from checkpointing.sharded import REST, read_sharded
from errors import CheckpointError, first_line, first_names, is_utf8, os_error_text, printable
from outputs.files import as_os_error
from utils import written_whole

log = logging.getLogger(__name__)

_PATHLIB = ("pathlib", "pathlib._local")  # the latter from Python 3.13 on
_LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning_fabric.utilities.data",
    "lightning.fabric.utilities.data",
)
_PREFIXES = ("module.", "_orig_mod.")
CLASSIFICATION, MULTILABEL = "classification", "multilabel"  # the values of --task
# Where checkpoints have their weights, and the average of them: ours and DeiT's, timm's and
# Lightning's, what tutorials write, DeepSpeed's, DINO's.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights")
_WEIGHTS += ("module", "teacher", "student")
_AVERAGES = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "ema_model")
# What torch's reader of plain data says of anything else.
_CODE = ("Unsupported operand", "Trying to call reduce", "Can only create new", "Can only build")
# Types that carry data and do nothing when they are made. DeiT's checkpoints hold their options as
# a Namespace, with paths in it; paths become ones that touch no file.
_NUMBERS = (np.bool_, np.int32, np.int64, np.float16, np.float32, np.float64)
_DATA_ONLY: list[Any] = [
    argparse.Namespace,
    # An accuracy is often a number of NumPy's.
    *((np.float64(0).__reduce__()[0], f"numpy.{m}.multiarray.scalar") for m in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(number)) for number in _NUMBERS),
    # Lightning's options are in dictionaries of a type of its own.
    *((dict, f"{module}.AttributeDict") for module in _LIGHTNING),
    *((pathlib.PurePosixPath, f"{m}.{n}PosixPath") for m in _PATHLIB for n in ("", "Pure")),
    *((pathlib.PureWindowsPath, f"{m}.{n}WindowsPath") for m in _PATHLIB for n in ("", "Pure")),
]


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that ``path`` is always either the old file or the new one, whole.

    Raises OSError where the file system refuses.
    """
    # A run's folder may have been moved away since.
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, durable=True) as temporary:
        try:
            with open(temporary, "wb") as file:
                sealed = SealedFile(file)
                torch.save(dict(content), sealed)
                sealed.seal()
        except RuntimeError as error:
            failure = as_os_error(error, path)
            if failure is None:
                raise
            raise failure from None


def load_checkpoint(
    source: str | Path, *, scattered: bool = False, weights: bool = True
) -> dict[str, Any]:
    """The content of a checkpoint file or https URL, on the CPU, without running its pickle's code.

    Takes this project's checkpoints, sharded ones too, bare state dicts, DeiT's and timm's training
    checkpoints and safetensors files. Of a sharded one each process reads its own part if
    ``scattered``, all of them at the same time; else all of it. Without ``weights`` nothing but the
    rest is read, where that is possible: what tensors hold is undefined then. Raises
    CheckpointError, with the reason, for anything else.
    """
    path = address.fetch(str(source)) if "://" in str(source) else Path(source).expanduser()
    try:
        sharded = (path / REST).is_file()
        if not sharded and not path.exists():
            raise CheckpointError(f"checkpoint {path} does not exist")
        content = _read(path / REST if sharded else path, weights=weights or sharded)
    except OSError as error:
        raise CheckpointError(f"checkpoint {os_error_text(error, path)}") from None
    problem = wrong_form(content)
    if problem:
        raise CheckpointError(
            f"checkpoint {path}: {problem}: it is of another program; save its weights alone "
            "(torch.save(state_dict, FILE))"
        )
    if sharded and weights:
        content = read_sharded(path, content, scattered=scattered)
    return {
        name: value for name, value in content.items() if value is not None or name not in FORMS
    }


def _read(path: Path, *, weights: bool) -> dict[str, Any]:
    """The content of a file that exists. Raises OSError and CheckpointError."""
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a device or pipe: name a file")
    sealed = path.is_file() and is_verified(path)
    if not sealed and (foreign := what_it_is(path)):
        raise CheckpointError(f"checkpoint {path} {foreign}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, weights=weights)
    zipped = sealed or _is_zip(path)
    if zipped and not sealed:
        check_archive(path, tensors=weights)
    try:
        with torch.serialization.safe_globals(_DATA_ONLY):
            # Only a zip archive can be left on the disk, by a name that is UTF-8.
            mapped = not weights and zipped and is_utf8(str(path))
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # torch raises many types for files that aren't its own
        text = str(error)
        found = re.search(r"GLOBAL (\S+)", text)
        if found or any(sign in text for sign in _CODE):
            what = f" ({printable(found.group(1))})" if found else ""
            raise CheckpointError(
                f"checkpoint {path} holds objects that would run code when read{what}; refused. "
                "Save its weights alone (torch.save(model.state_dict(), …)) where you trust it"
            ) from None
        # Before its reason torch advises to read the file without this protection.
        reason = text.partition("WeightsUnpickler error:")[2].strip() or text
        reason = (reason.splitlines() or [type(error).__name__])[0]
        # What some say is a mere number or byte.
        if " " not in reason:
            reason = "its bytes are no checkpoint's, or damaged"
        raise CheckpointError(f"checkpoint {path} can't be read: {printable(reason)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a dictionary"
        )
    return content


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _read_safetensors(path: Path, *, weights: bool) -> dict[str, Any]:
    from safetensors.torch import load_file

    if _is_zip(path):
        raise CheckpointError(
            f"checkpoint {path} is torch.save's, not safetensors: name it "
            f"{path.with_suffix('.pth').name}"
        )
    check_safetensors(path)
    with _safetensors_errors(path):
        return load_file(path) if weights else {}


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text in the header of a safetensors file. Raises CheckpointError."""
    from safetensors import safe_open

    with _safetensors_errors(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of types that it doesn't know also KeyError and others
        raise CheckpointError(
            f"checkpoint {path} can't be read: {printable(first_line(error))}"
        ) from None


@contextlib.contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Inside, a CheckpointError names the checkpoint ``source``."""
    try:
        yield
    except CheckpointError as error:
        if str(source) in str(error):
            raise
        raise CheckpointError(f"{source}: {error}") from None


def weights_of(content: Mapping[str, Any], *, ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, without the prefixes of DDP and torch.compile, and with
    adapters of low rank in the layers that they belong to.

    With ``ema`` the moving average; CheckpointError if there is none.
    """
    name, weights = _state_dict_in(content, _AVERAGES if ema else _WEIGHTS)
    if ema and weights is None:
        raise CheckpointError("the checkpoint holds no moving average of the weights")
    if weights is None:
        name, weights = _state_dict_in(content, _AVERAGES)
    if weights is None:
        weights = content
    elif not ema and name in ("teacher", "student", *_AVERAGES):
        others = [n for n in (*_WEIGHTS, *_AVERAGES) if n != name and n in content]
        beside = f" (it holds {', '.join(others)} too)" if others else ""
        log.info("the weights are the checkpoint's %r%s", name, beside)
    numbers = [key for key in weights if not isinstance(key, str)]
    if numbers:
        raise CheckpointError(f"its weights have names that are no text ({first_names(numbers)})")
    weights = {_without_prefixes(k): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise CheckpointError(
            f"the checkpoint holds no weights: its entries are {first_names(list(content), 8)}"
        )
    if adapters.has_adapters(weights):
        options = content.get("config")
        return adapters.merged(weights, options if isinstance(options, Mapping) else {})
    return weights


def _state_dict_in(
    content: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[str, Mapping[str, Any] | None]:
    """The first of the entries ``names`` that holds tensors, which may lie one level deeper."""
    for name in names:
        found = content.get(name)
        if not isinstance(found, Mapping):
            continue
        inner = next((found[n] for n in _WEIGHTS if isinstance(found.get(n), Mapping)), found)
        if any(isinstance(value, torch.Tensor) for value in inner.values()):
            return name, inner
    return "", None


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def options_of(source: str | Path) -> dict[str, Any]:
    """The options of the run that wrote a checkpoint, whose weights are not read."""
    return load_checkpoint(source, weights=False).get("config") or {}


def split_of(content: Mapping[str, Any], seed: int) -> tuple[int, torch.Tensor | None]:
    """What a run's validation part is drawn with: the seed, and the numbers of its images.

    Of a checkpoint that knows neither: ``seed``, and None.
    """
    split, options = content.get("split") or {}, content.get("config") or {}
    return split.get("seed", options.get("seed", seed)), split.get("held_out")


def model_of(content: Mapping[str, Any]) -> str | None:
    """The model that a checkpoint of this project names; None of one from elsewhere."""
    name = content.get("config", {}).get("model")
    return name if isinstance(name, str) else None


def task_of(content: Mapping[str, Any]) -> str:
    """What the model of a checkpoint of this project was trained for: an option of ``--task``."""
    return content.get("config", {}).get("task", CLASSIFICATION)


def thresholds_of(content: Mapping[str, Any], *, ema: bool = False) -> tuple[float, ...] | None:
    """The thresholds of a multi-label checkpoint, or of its average (``ema``), one per class."""
    found = content.get("ema_thresholds" if ema else "thresholds")
    return None if found is None else tuple(found)


def class_names_of(content: Mapping[str, Any]) -> list[str] | None:
    """The class names a checkpoint of this project carries."""
    return content.get("class_names")


def without_optimizer(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the model needs: no run can go on from it."""
    return {k: v for k, v in content.items() if k not in ("optimizer", "schedule", "scaler")}
