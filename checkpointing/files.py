"""Checkpoints: written atomically, read without running code, found again after a crash.

A checkpoint is one file of tensors and primitives; ``torch.load(..., weights_only=True)`` reads it:

=============== ====================================================================================
``model``       weights, under the published names
``model_ema``   their moving average, or None
``optimizer``, ``scaler``, ``schedule``, ``progress``, ``rng``   everything to go on exactly
``config``      the resolved options of the run
``class_names``, ``preprocessing``, ``metrics``   what a user of the model needs
``bad_images``  "path: reason" of images that could not be read
``versions``    of torch, torchvision, timm and Python that wrote it
=============== ====================================================================================
"""

import argparse
import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from checkpointing.sharded import REST, read_sharded
from errors import CheckpointError
from utils import written_whole

_PREFIXES = ("module.", "_orig_mod.")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that ``path`` is always either the old file or the new one, whole.

    Raises OSError where the file system refuses.
    """
    # A run's folder may have been moved away since.
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, durable=True) as temporary, open(temporary, "wb") as file:
        torch.save(dict(content), file)


def load_checkpoint(source: str | Path, *, scattered: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file or https URL, on the CPU, without running its pickle's code.

    Takes this project's checkpoints, sharded ones too, bare state dicts, DeiT's and timm's training
    checkpoints and safetensors files. Of a sharded one each process reads its own part if
    ``scattered``, all of them at the same time; else all of it. Raises CheckpointError, with the
    reason, for anything else.
    """
    path = _fetch(str(source)) if "://" in str(source) else Path(source).expanduser()
    if (path / REST).is_file():
        return read_sharded(path, load_checkpoint(path / REST), scattered=scattered)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_safetensors

        try:
            return load_safetensors(path)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {path} can't be read: {error}") from None
    _check_archive(path)
    try:
        # DeiT's own checkpoints hold their options as a Namespace, which carries data only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that aren't its own
        if "Unsupported global" in str(error) or "Unsupported operand" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f" ({found.group(1)})" if found else ""
            raise CheckpointError(
                f"checkpoint {path} holds objects that would run code when read{what}; refused. "
                "Save its weights alone (torch.save(model.state_dict(), …)) where you trust it"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} can't be read: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a dictionary"
        )
    return content


def _check_archive(path: Path) -> None:
    """Compare the file's checksums: torch itself doesn't, and would train on with flipped bits."""
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise CheckpointError(f"checkpoint {path} is truncated")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None
    if damaged:
        raise CheckpointError(f"checkpoint {path} is damaged: {damaged} fails its checksum")


def _fetch(url: str) -> Path:
    """Download ``url`` into torch's cache, once.

    ``#sha256=HEX`` behind it, or timm's ``-HEX.pth`` at the end of the name, is compared with the
    file's checksum, on every use.
    """
    address, _, fragment = url.partition("#")
    if not address.startswith("https://"):
        raise CheckpointError(f"{url}: only https addresses are fetched")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{8,64}", fragment):
        raise CheckpointError(f"{url}: expected #sha256= and 8 to 64 hexadecimal digits")
    name = Path(urlsplit(address).path).name
    if not name or name.startswith("."):
        raise CheckpointError(f"{url}: names no file")
    in_name = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    expected = fragment.removeprefix("sha256=").lower() or (in_name[1] if in_name else "")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # To a temporary file first, which gets its name when it is whole.
            torch.hub.download_url_to_file(address, str(path))
        except OSError as error:
            raise CheckpointError(
                f"{url} can't be fetched ({error}); give a file in its place"
            ) from None
    if expected:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(expected):
            path.unlink()
            raise CheckpointError(f"{url}: its sha256 is {found}, expected {expected}; refused")
    return path


def weights_of(content: Mapping[str, Any], *, ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, without the prefixes of DDP and torch.compile.

    With ``ema`` the moving average; CheckpointError if there is none.
    """
    names = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    weights: Any = next((content[n] for n in names if isinstance(content.get(n), Mapping)), None)
    if weights is None:
        if ema:
            raise CheckpointError("the checkpoint holds no moving average of the weights")
        weights = content
    weights = {_without_prefixes(k): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise CheckpointError("the checkpoint holds no weights")
    return weights


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def options_of(source: str | Path) -> dict[str, Any]:
    """The options of the run that wrote a checkpoint; of a sharded one only those are read."""
    rest = Path(source).expanduser() / REST
    return load_checkpoint(rest if rest.is_file() else source).get("config") or {}


def class_names_of(content: Mapping[str, Any]) -> list[str] | None:
    """The class names a checkpoint of this project carries."""
    return content.get("class_names")


def without_optimizer(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the model needs: no run can go on from it."""
    return {k: v for k, v in content.items() if k not in ("optimizer", "schedule", "scaler")}
