"""Checkpoints: written atomically, read without running code, found again after a crash.

A checkpoint is one file of tensors and primitives; ``torch.load(..., weights_only=True)`` reads it:

=============== ====================================================================================
``model``       weights, under the published names
``model_ema``   their moving average, or None
``optimizer``, ``scaler``, ``schedule``, ``progress``, ``rng``   everything to go on exactly
``config``      the resolved options of the run
``class_names``, ``preprocessing``, ``metrics``   what a user of the model needs
``versions``    of torch, torchvision, timm and Python that wrote it
=============== ====================================================================================
"""

import argparse
import hashlib
import logging
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

import parallel
from errors import CheckpointError
from utils import copy_to_host

log = logging.getLogger(__name__)

BEST = "best.pth"
_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.(?:pth|shards)")
_PREFIXES = ("module.", "_orig_mod.")


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that ``path`` is always either the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    # A run's folder may have been moved away since.
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_file(source: str | Path, *, scattered: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file or https URL, on the CPU, without running its pickle's code.

    Takes this project's checkpoints, sharded ones too, bare state dicts, DeiT's and timm's training
    checkpoints and safetensors files. Of a sharded one each process reads its own part if
    ``scattered``, all of them at the same time; else all of it. Raises CheckpointError, with the
    reason, for anything else.
    """
    path = _fetch(str(source)) if "://" in str(source) else Path(source).expanduser()
    if (path / parallel.REST).is_file():
        return parallel.read_sharded(path, load_file(path / parallel.REST), scattered=scattered)
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
    rest = Path(source).expanduser() / parallel.REST
    return load_file(rest if rest.is_file() else source).get("config") or {}


def class_names_of(content: Mapping[str, Any]) -> list[str] | None:
    """The class names a checkpoint of this project carries."""
    return content.get("class_names")


# --- a run's folder -------------------------------------------------------------------------------


def name_of(epoch: int, samples: int) -> str:
    """Name of the checkpoint after ``epoch`` epochs and ``samples`` pictures of the next.

    The file ends in ``.pth``, the folder of a sharded one in ``.shards``.
    """
    return f"checkpoint-{epoch:04d}-{samples:08d}" if samples else f"checkpoint-{epoch:04d}"


def in_folder(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first (``best.pth`` not among them)."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_place, reverse=True)


def _place(path: Path) -> tuple[int, int]:
    """(epochs, pictures of the next one) that a checkpoint's name tells."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]), int(match[2] or 0)


def newer_in_folder(folder: Path, epoch: int, samples: int) -> list[Path]:
    """The checkpoints of a run that come after that point."""
    return [path for path in in_folder(folder) if _place(path) > (epoch, samples)]


def load_latest(folder: Path, *, scattered: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole; damaged ones are reported and passed over."""
    paths = in_folder(folder)
    for path in paths:
        try:
            return path, load_file(path, scattered=scattered)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def holds_run(folder: Path) -> bool:
    """Whether a run was written here."""
    return (folder / "log.txt").exists() or bool(in_folder(folder))


def save_in_folder(folder: Path, content: Mapping[str, Any], *, keep: int, best: bool) -> Path:
    """Save a run's newest checkpoint and keep the last ``keep``; ``best`` sets ``best.pth`` too."""
    progress = content["progress"]
    path = folder / f"{name_of(progress['epoch'], progress['samples'])}.pth"
    save(path, content)
    if best:
        set_best(folder, path)
    keep_newest(folder, keep, path)
    return path


def keep_newest(folder: Path, keep: int, written: Path) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run, and the one just ``written``."""
    for old in in_folder(folder)[keep:]:
        if old == written:
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


class BackgroundWriter:
    """Writes a run's checkpoints while training goes on.

    :meth:`submit` returns once the content is copied to host memory; a thread writes the copy. The
    file system's errors are kept, not raised, because training is worth more than a file.

    Attributes:
        saved: the newest file that was written whole.
        error: why the last write failed, or None.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.saved: Path | None = None
        self.error: OSError | None = None
        self._thread: threading.Thread | None = None

    def submit(self, content: Mapping[str, Any], *, best: bool) -> None:
        """Write ``content`` as it is now, after the write under way, if any, is done."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(copy_to_host(content), best))
        self._thread.start()

    def wait(self) -> None:
        """Until everything submitted is on disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, content: Mapping[str, Any], best: bool) -> None:
        try:
            self.saved = save_in_folder(self.folder, content, keep=self.keep, best=best)
            self.error = None
        except OSError as error:
            self.error = error
            log.warning(
                "no checkpoint was written to %s: %s. Training goes on and the older ones stay; "
                "free space there",
                self.folder,
                error.strerror or error,
            )


def without_optimizer(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the model needs: no run can go on from it."""
    return {k: v for k, v in content.items() if k not in ("optimizer", "schedule", "scaler")}


def write_best(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``best.pth``; a file system that refuses is a warning, as in BackgroundWriter."""
    try:
        save(folder / BEST, content)
    except OSError as error:
        log.warning("no %s was written to %s: %s", BEST, folder, error.strerror or error)


def set_best(folder: Path, path: Path) -> None:
    """Make ``best.pth`` the same as ``path``; a link where the file system has links.

    Of a sharded checkpoint it gets the weights, in one file.
    """
    if path.is_dir():
        write_best(folder, without_optimizer(load_file(path)))
        return
    temporary = folder / f".{BEST}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, folder / BEST)
    _sync_folder(folder)
