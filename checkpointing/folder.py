"""The checkpoints in a run's folder: newest, best, and which are kept."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpointing.files import load_checkpoint, save_checkpoint, without_optimizer
from errors import CheckpointError
from utils import written_whole

log = logging.getLogger(__name__)
BEST = "best.pth"
CONFIG_FILE = "config.yaml"
ON_SIGNAL = "on_signal"  # the entry of a checkpoint that says whether a signal asked for it
_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.(?:pth|shards)")


def checkpoint_name(epoch: int, samples: int) -> str:
    """Name of the checkpoint after ``epoch`` epochs and ``samples`` images of the next one.

    The extension is missing: the file's is ``.pth``, that of a sharded one's folder ``.shards``.
    """
    return f"checkpoint-{epoch:04d}-{samples:08d}" if samples else f"checkpoint-{epoch:04d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first (``best.pth`` not among them)."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_position, reverse=True)


def _position(path: Path) -> tuple[int, int]:
    """(epochs, images of the next one) in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]), int(match[2] or 0)


def epochs_in(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run that were written at the end of an epoch, by the epochs done."""
    places = {_position(path): path for path in checkpoints_in(folder)}
    return {epoch: path for (epoch, samples), path in places.items() if not samples}


def newer_checkpoints(folder: Path, epoch: int, samples: int) -> list[Path]:
    """The checkpoints of a run that come after that point."""
    return [path for path in checkpoints_in(folder) if _position(path) > (epoch, samples)]


def load_newest(
    folder: Path, *, scattered: bool = False, regular: bool = False
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole; damaged ones are reported and passed over.

    With ``regular`` so are those that a signal asked for, unless there is no other.
    """
    paths, asked_for = checkpoints_in(folder), None
    for path in paths:
        try:
            content = load_checkpoint(path, scattered=scattered)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
            continue
        if not regular or not content.get(ON_SIGNAL):
            return path, content
        asked_for = asked_for or (path, content)
    if paths and not asked_for:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return asked_for


def holds_run(folder: Path) -> bool:
    """Whether a run was written here."""
    return (folder / "log.txt").exists() or bool(checkpoints_in(folder))


def name_of(content: Mapping[str, Any]) -> str:
    """:func:`checkpoint_name` of a checkpoint's content."""
    return checkpoint_name(content["progress"]["epoch"], content["progress"]["samples"])


def keep_newest(folder: Path, keep: int, written: Path) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run, and the one just ``written``."""
    for old in checkpoints_in(folder)[keep:]:
        if old != written:
            remove(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what a session that was killed left half-written, see ``written_whole``."""
    names = [f".*.tmp.{suffix}" for suffix in ("pth", "txt", "png", "yaml", "csv", "json")]
    for name in (*names, ".checkpoint-*.tmp*", ".checkpoint-*.old"):
        for path in folder.glob(name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, if the file system lets us."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def set_best(folder: Path, path: Path) -> None:
    """Make ``best.pth`` the same as ``path``; a link where the file system has links.

    Of a sharded checkpoint it gets the weights, in one file. Raises OSError.
    """
    if path.is_dir():
        save_checkpoint(folder / BEST, without_optimizer(load_checkpoint(path)))
        return
    with written_whole(folder / BEST, durable=True) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
