"""When a run saves, and what a checkpoint of it holds."""

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import utils
from checkpointing.folder import ON_SIGNAL, checkpoint_name, checkpoints_in
from checkpointing.writer import open_writer
from distributed.processes import any_process
from training.bad_images import BadImages
from training.build import Parts
from training.resume import Start


class Saver:
    """Writes the checkpoints of a run; to be called by all processes alike.

    Args:
        parts: what is trained.
        folder: the run's.
        bad_images: those that are listed in checkpoints.
        start: the checkpoint that the run goes on from, if any.
        tracked: the run in trackers, ``tracking.Tracking.noted``.

    Attributes:
        writer: ``saved`` and ``error`` tell what became of the last one.
        thresholds: those of a multi-label run by the name of their entry, as last found.
    """

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        bad_images: BadImages,
        start: Start | None,
        tracked: Mapping[str, str] | None = None,
    ) -> None:
        self.parts = parts
        self.thresholds = thresholds_in(start.content if start else {})
        self.tracked = tracked
        self.bad_images = bad_images
        self.writer = open_writer(
            folder,
            keep=parts.config.save.keep,
            sharded=parts.config.dist.fsdp,
            is_main=parts.processes.is_main,
            outputs=parts.outputs,
        )
        self._saved_at = time.monotonic()
        if start and Path(start.source).parent.resolve() == folder.resolve():
            # By the name that the writer would give it: a user may have written another one.
            self._know(folder / Path(start.source).name, start.content)

    def _know(self, path: Path, content: Mapping[str, Any]) -> None:
        """Take the checkpoint that the run goes on from for one that was written by it."""
        if content.get(ON_SIGNAL):
            self.writer.extra = path
        if content.get("config") == self.parts.config.recipe():
            self.writer.saved = path

    def due(self) -> bool:
        """Whether it is time for a checkpoint within the epoch."""
        options = self.parts.config.save
        update = self.parts.state.progress.update
        due = bool(options.save_every_steps) and update % options.save_every_steps == 0
        if options.save_every_minutes:
            minutes = (time.monotonic() - self._saved_at) / 60
            due = any_process(minutes >= options.save_every_minutes) or due
        return due

    def save(
        self,
        metrics: dict[str, Any] | None = None,
        *,
        best: bool = False,
        on_signal: bool = False,
    ) -> None:
        """Hand a checkpoint to the writer, which writes it while training goes on."""
        self._saved_at = time.monotonic()
        if self.writer.needs_content:
            content = self._content(metrics or {}) | {ON_SIGNAL: on_signal}
            self.writer.save(content, best=best)

    def save_now(self) -> None:
        """Save where training stands, unless that is on disk already, and wait for it."""
        progress = self.parts.state.progress
        self.writer.wait()
        here = checkpoint_name(progress.epoch, progress.samples)
        if self.writer.saved is None or self.writer.saved.stem != here:
            # One in its place that is kept, and that a rollback goes back to, stays such a one.
            there = [path for path in checkpoints_in(self.writer.folder) if path.stem == here]
            self.save(on_signal=there in ([], [self.writer.extra]))
        self.writer.finish()

    def _content(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; see checkpointing/files.py."""
        parts = self.parts
        return parts.state.state_dict() | {
            "rng": utils.rng_state(),
            "config": parts.config.recipe(),
            "class_names": parts.data.class_names,
            "preprocessing": parts.preprocessing.to_dict(),
            "hub_config": parts.hub_config,
            "split": parts.data.split,
            **self.thresholds,
            "metrics": metrics,
            "bad_images": list(self.bad_images.listed),
            "versions": versions(),
            **({"tracking": dict(self.tracked)} if self.tracked else {}),
        }


def thresholds_in(content: Mapping[str, Any]) -> dict[str, list[float]]:
    """The entries of a checkpoint that hold thresholds."""
    names = ("thresholds", "ema_thresholds")
    return {name: list(content[name]) for name in names if content.get(name) is not None}


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
    }
