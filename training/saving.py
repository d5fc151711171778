"""When a run saves, and what a checkpoint of it holds."""

import platform
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import utils
from checkpointing.folder import checkpoint_name
from checkpointing.writer import open_writer
from distributed.processes import any_process
from training.bad_images import BadImages
from training.build import Parts


class Saver:
    """Writes the checkpoints of a run; to be called by all processes alike.

    Attributes:
        writer: ``saved`` and ``error`` tell what became of the last one.
    """

    def __init__(self, parts: Parts, folder: Path, bad_images: BadImages) -> None:
        self.parts = parts
        self.bad_images = bad_images
        self.writer = open_writer(
            folder,
            keep=parts.config.save.keep,
            sharded=parts.config.dist.fsdp,
            is_main=parts.processes.is_main,
            outputs=parts.outputs,
        )
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a checkpoint within the epoch."""
        options = self.parts.config.save
        update = self.parts.state.progress.update
        due = bool(options.save_every_steps) and update % options.save_every_steps == 0
        if options.save_every_minutes:
            minutes = (time.monotonic() - self._saved_at) / 60
            due = any_process(minutes >= options.save_every_minutes) or due
        return due

    def save(self, metrics: dict[str, Any] | None = None, *, best: bool = False) -> None:
        """Hand a checkpoint to the writer, which writes it while training goes on."""
        self._saved_at = time.monotonic()
        if self.writer.needs_content:
            self.writer.save(self._content(metrics or {}), best=best)

    def save_now(self) -> None:
        """Save where training stands, unless that is on disk already, and wait for it."""
        progress = self.parts.state.progress
        self.writer.wait()
        here = checkpoint_name(progress.epoch, progress.samples)
        if self.writer.saved is None or self.writer.saved.stem != here:
            self.save()
        self.writer.finish()

    def _content(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; see checkpointing/files.py."""
        parts = self.parts
        return parts.state.state_dict() | {
            "rng": utils.rng_state(),
            "config": parts.config.recipe(),
            "class_names": parts.data.class_names,
            "preprocessing": parts.preprocessing.to_dict(),
            "split": parts.data.split,
            "metrics": metrics,
            "bad_images": list(self.bad_images.listed),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
    }
