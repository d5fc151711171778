"""What a run says at its start and at its end."""

import logging
import shlex
from pathlib import Path

import torch

from checkpointing.folder import BEST, checkpoints_in
from config import Config, unused
from loggers import CURVES_FILE, LOG_FILE
from pipeline.dataset import summarise_classes
from training.bad_images import BAD_IMAGES_FILE
from training.build import Parts, effective_batch, total_epochs
from training.saving import Saver

log = logging.getLogger(__name__)

_AMP_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}


def announce_start(parts: Parts, folder: Path) -> None:
    """Say what is about to be trained on what, and how."""
    config, data, summary = parts.config, parts.data, parts.summary
    trainable = sum(p.numel() for p in parts.state.model.parameters() if p.requires_grad)
    side = config.model.input_size
    log.info(
        "model    %s: %.2f M parameters (%.2f M trainable), %.2f GMACs at %d×%d",
        config.model.model,
        summary.parameters / 1e6,
        trainable / 1e6,
        summary.macs / 1e9,
        side,
        side,
    )
    log.info(
        "data     %s: %d training and %d validation images, %d classes",
        config.data.data_set,
        len(data.train),
        len(data.val),
        len(data.class_names),
    )
    _, lines = summarise_classes(data.train)
    for line in lines:
        warning = line.removeprefix("warning: ")
        log.log(logging.INFO if warning == line else logging.WARNING, "         %s", warning)
    log.info("input    %s", data.source_description(parts.device))
    batch = effective_batch(config, parts.processes)
    rule = "as given" if config.optim.unscale_lr else f"{config.optim.lr:g} × {batch} / 512"
    log.info(
        "batch    %d = %d × %d process(es) × %d accumulated; learning rate %.3g (%s)",
        batch,
        config.data.batch_size,
        parts.processes.world_size,
        config.optim.accum_steps,
        parts.state.schedule.lr,
        rule,
    )
    log.info(
        "run      %d epochs of %d steps on %s in %s, into %s",
        total_epochs(config),
        data.steps,
        parts.device,
        _AMP_NAMES[parts.settings.amp],
        folder,
    )
    for line in unused(config):
        log.warning("%s", line)


def announce_interruption(config: Config, folder: Path, saver: Saver, signal: int | None) -> int:
    """Say where the run stopped and how to go on; returns the exit code."""
    if saver.writer.error:
        newest = checkpoints_in(folder)
        log.error(
            "stopped by signal %d; where it stood could NOT be saved, the newest checkpoint is %s",
            signal,
            newest[0] if newest else "none",
        )
        return 1
    log.info("stopped by signal %d; saved %s", signal, saver.writer.saved)
    log.info("go on with: %s", _command(config, "--resume", str(saver.writer.saved)))
    return 128 + (signal or 0)


def announce_end(parts: Parts, folder: Path, saver: Saver, bad_images: int) -> int:
    """Say what was reached and where everything is; returns the exit code."""
    config, progress = parts.config, parts.state.progress
    if bad_images:
        log.warning(
            "%d images could not be read and were skipped; they are listed in %s",
            bad_images,
            folder / BAD_IMAGES_FILE,
        )
    if saver.writer.error:
        log.error("the last checkpoint is missing: free space, then --resume auto")
        return 1
    if progress.best is not None:
        log.info(
            "best     %s %.2f after epoch %d",
            config.save.best_metric,
            progress.best,
            progress.best_epoch + 1,
        )
    best = folder / BEST
    weights = best if best.exists() else saver.writer.saved
    log.info("weights  %s", weights)
    log.info("curves   %s", folder / CURVES_FILE)
    tensorboard = (
        f" and TensorBoard: tensorboard --logdir {folder}" if config.log.tensorboard else ""
    )
    log.info("logs     %s%s", folder / LOG_FILE, tensorboard)
    if progress.epoch < total_epochs(config) and config.run.stop_at_epoch:
        log.info("next     %s", _command(config, "--resume", str(saver.writer.saved)))
    else:
        log.info("next     %s", _command(config, "--eval", "--resume", str(weights)))
    return 0


def _command(config: Config, *arguments: str) -> str:
    # A checkpoint doesn't get to name code to import, so plugins are named anew.
    plugins = ("--plugin", *config.run.plugin) if config.run.plugin else ()
    return shlex.join(["python", "main.py", *arguments, *plugins])
