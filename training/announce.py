"""What a run says at its start and at its end."""

import logging
import shlex
from pathlib import Path

import torch

from architectures.sizes import size_text
from checkpointing.folder import BEST, checkpoints_in
from config import FITTED, Config, stages, unused
from loggers import CURVES_FILE, LOG_FILE
from outputs.message_log import RUN_LOG
from pipeline.dataset import summarise_classes
from training.bad_images import BAD_IMAGES_FILE
from training.build import Parts, effective_batch, total_epochs
from training.data import Data
from training.ending import way_on
from training.outlook import few_images, large_images, lost_levels
from training.saving import Saver

log = logging.getLogger(__name__)

_AMP_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}


def announce_start(parts: Parts, folder: Path) -> None:
    """Say what is about to be trained on what, and how."""
    config, data, summary = parts.config, parts.data, parts.summary
    trainable = sum(p.numel() for p in parts.state.model.parameters() if p.requires_grad)
    log.info(
        "model    %s: %.2f M parameters (%.2f M trainable), %.2f GMACs at %d×%d",
        config.model.model,
        summary.parameters / 1e6,
        trainable / 1e6,
        summary.macs / 1e9,
        *config.model.size,
    )
    if phases := stages(config.model.train_sizes):
        words = (f"{size_text(size)} from epoch {epoch + 1}" for epoch, size in phases)
        log.info("sizes    training images of %s", ", ".join(words))
    _announce_images(config, data)
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
    if config.origin["warmup_epochs"] == FITTED:
        log.info(
            "warm-up  %g of %d epochs, shortened to a fifth: --warmup-epochs sets another length",
            config.schedule.warmup_epochs,
            config.run.epochs,
        )
    for line in unused(config):
        log.warning("%s", line)
    if parts.processes.is_main:
        for advice in filter(None, (large_images(config, data), lost_levels(config, data.train))):
            log.warning("%s", advice)
    if not parts.state.progress.update:
        advice = few_images(config, data.train, parts.state.model, folder)
        if advice:
            log.warning("%s", advice)
            log.info("time     is said after the first steps")


def _announce_images(config: Config, data: Data) -> None:
    """Say what is trained and validated on, and what of it an epoch has."""
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
    if data.sampler.num_samples != len(data.train):
        log.info(
            "         an epoch has %d of these images: --sampler %s",
            data.sampler.num_samples,
            config.data.sampler,
        )


def announce_interruption(
    config: Config, folder: Path, saver: Saver, signal: int, *, lost: bool = False
) -> int:
    """Say where the run stopped and how to go on; returns the exit code.

    ``lost``: where it stood was not to be saved.
    """
    why = f"stopped by signal {signal}" if signal else f"--stop-after {config.run.stop_after:g}"
    if lost or saver.writer.error:
        log.error("%s; where it stood could NOT be saved", why)
        return _without_the_last(config, folder)
    if saver.writer.lacks_best:
        log.error("%s could NOT be written: it lacks the best epoch", folder / BEST)
    log.info("%s; saved %s", why, saver.writer.saved)
    log.info("go on with: %s", _command(config, "--resume", str(saver.writer.saved)))
    return 128 + signal if signal else 0


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
        log.error("the last checkpoint could NOT be written")
        return _without_the_last(config, folder)
    _announce_best(parts)
    best = folder / BEST
    if saver.writer.lacks_best:
        log.error("%s could NOT be written: it lacks the best epoch", best)
        return 1
    weights = best if best.exists() else saver.writer.saved
    log.info("weights  %s", weights)
    log.info("curves   %s", folder / CURVES_FILE)
    tensorboard = (
        f" and TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}"
        if config.log.tensorboard
        else ""
    )
    log.info("logs     %s, %s%s", folder / LOG_FILE, RUN_LOG, tensorboard)
    if progress.epoch < total_epochs(config) and config.run.stop_at_epoch:
        log.info("next     %s", _command(config, "--resume", str(saver.writer.saved)))
    else:
        log.info("next     %s", _command(config, "--eval", "--resume", str(weights)))
    return 0


def announce_over(parts: Parts, folder: Path, source: str, over: str) -> None:
    """Say why a run that ``source`` is the last checkpoint of has nothing left to train."""
    config, best = parts.config, folder / BEST
    log.info("nothing left to train: %s; %s", over, way_on(config, parts.state.progress))
    _announce_best(parts)
    weights = best if best.exists() else source
    log.info("weights  %s", weights)
    log.info("next     %s", _command(config, "--eval", "--resume", str(weights)))


def _announce_best(parts: Parts) -> None:
    progress, metric = parts.state.progress, parts.config.save.best_metric
    if progress.best is not None:
        log.info("best     %s %.2f after epoch %d", metric, progress.best, progress.best_epoch)


def _without_the_last(config: Config, folder: Path) -> int:
    """Say what there is where the last checkpoint could not be written; returns the exit code."""
    newest = next(iter(checkpoints_in(folder)), None)
    if newest is None:
        log.error("there is no checkpoint in %s: what was trained is lost", folder)
    else:
        log.error(
            "the newest checkpoint is %s; once storage takes it, go on with: %s",
            newest,
            _command(config, "--resume", str(newest)),
        )
    return 1


def _command(config: Config, *arguments: str) -> str:
    # A checkpoint doesn't get to name code to import, so plugins are named anew.
    plugins = ("--plugin", *config.run.plugin) if config.run.plugin else ()
    return shlex.join(["python", "main.py", *arguments, *plugins])
