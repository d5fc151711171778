"""The story of a run: processes, folder, data, model, criterion, state, epochs."""

import gc
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import checkpoint
import engine
import optim
import rendezvous
import utils
from augment import Preprocessing
from build import Data, build_criterion, build_data, build_model, build_state, step_options
from config import Config, to_yaml
from errors import OptionError, OutOfMemoryError
from evaluation import evaluate_checkpoint
from lock import RunLock
from models import ModelSummary, summarise
from resume import find_start, open_folder, output_folder, resume, start_at
from state import TrainState
from trainer import Trainer

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


def run(config: Config) -> int:
    """Train (or, with ``--eval``, evaluate) as ``config`` says; returns the exit code."""
    with rendezvous.joined(config.dist, config.run.device) as processes:
        return _run(config, processes)


def _run(config: Config, processes: utils.Processes) -> int:
    utils.setup_messages(processes)
    device = utils.pick_device(config.run.device, processes.local_rank)
    utils.set_determinism(config.run.deterministic)
    utils.import_plugins(config.run.plugin)
    if config.run.eval:
        if config.data.batch_size == "auto":
            config = config.replace("--eval", batch_size=64)
        return evaluate_checkpoint(config, processes, device)
    if config.run.overfit_batches:
        config = overfitting(config)

    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not config.run.resume:
        raise OptionError("resume", "torchrun is to start this run again after a failure "
                          "(--max-restarts): add --resume auto, so that it goes on")  # fmt: skip
    folder = output_folder(config)
    locks: list[RunLock] = []
    utils.on_main_process(processes, lambda: locks.append(open_folder(config, folder)))
    try:
        if config.data.batch_size == "auto":
            return _train_what_fits(config, processes, device, folder)
        return _train(config, processes, device, folder)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_what_helps(config, device)) from None
    finally:
        for lock in locks:
            lock.release()


def _train_what_fits(
    config: Config, processes: utils.Processes, device: torch.device, folder: Path
) -> int:
    """Train with the largest batch that fits, and accumulation up to ``--effective-batch``."""
    effective, world = config.data.effective_batch, processes.world_size
    if effective % world:
        raise OptionError("effective_batch", f"{effective} can't be shared by {world} processes")
    share = effective // world
    # The host's memory ends runs without a warning: what is usual fits there.
    most = share if device.type == "cuda" else min(share, 64)
    sizes = [size for size in range(most, 0, -1) if share % size == 0]
    for size in sizes:
        chosen = config.replace("--batch-size auto", batch_size=size, accum_steps=share // size)
        if size != sizes[0] and checkpoint.holds_run(folder):
            # It fitted at first and no longer did: on from the last checkpoint.
            chosen = chosen.replace("--batch-size auto", resume="auto")
        try:
            return _train(chosen, processes, device, folder, probing=True)
        except RuntimeError as error:
            # Where several processes train, the others wait in an exchange, unless it was probed.
            alone = not processes.distributed or isinstance(error, BatchTooLarge)
            if not (alone and _is_out_of_memory(error)) or size == sizes[-1]:
                raise
            # The error holds on to everything on the device.
            error.__traceback__ = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("batch    %d pictures at a time don't fit %s: fewer", size, device)
    raise AssertionError("unreachable: the last size returns or raises")


class BatchTooLarge(torch.OutOfMemoryError):
    """A try with pictures of no content ran out of memory, on some process; raised on all."""


def _probe(
    config: Config,
    state: TrainState,
    criterion: nn.Module,
    options: engine.StepOptions,
    num_classes: int,
) -> None:
    """Raise BatchTooLarge, on all processes, unless a step on grey pictures fits everywhere.

    Nothing of the state changes. The optimiser's two moments, which come with the first update, are
    counted by memory of their size.
    """
    fits = True
    try:
        moments = [torch.zeros_like(p) for p in state.model.parameters() for _ in range(2)]
        engine.rehearse(state, criterion, options, config.data.batch_size, num_classes)
        del moments
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        fits = False
    if utils.any_process(not fits):
        raise BatchTooLarge("too many pictures at a time")


class Parts(NamedTuple):
    """What a run has beside its data."""

    preprocessing: Preprocessing
    summary: ModelSummary
    criterion: nn.Module
    state: TrainState
    freezer: optim.Freezer


def assemble(
    config: Config,
    processes: utils.Processes,
    device: torch.device,
    data: Data,
    resumed: dict[str, Any] | None = None,
) -> Parts:
    """Model, criterion and state for ``data``, whose transforms are set on the way.

    A run that is ``resumed`` from a checkpoint needs no weights to start from.
    """
    utils.seed_all(config.run.seed)
    model, preprocessing = build_model(config, len(data.class_names), device, resumed)
    summary = summarise(model, config.model.input_size)
    data.set_transforms(config, preprocessing, device)
    criterion = build_criterion(config, data, preprocessing, device)
    state, freezer = build_state(config, model, data, processes, device)
    return Parts(preprocessing, summary, criterion, state, freezer)


def _train(
    config: Config,
    processes: utils.Processes,
    device: torch.device,
    folder: Path,
    *,
    probing: bool = False,
) -> int:
    """The story of a training run, into ``folder``."""
    start = find_start(config, folder)
    data = build_data(config, processes)
    resumed = start[1] if start else None
    preprocessing, summary, criterion, state, freezer = assemble(
        config, processes, device, data, resumed
    )
    if start is not None:
        resume(state, config, data, processes, folder, *start)
    elif config.run.start_epoch:
        start_at(state.progress, config.run.start_epoch, data.updates_per_epoch(config))
    if probing:
        options = step_options(config, processes, device, data, state.model)
        _probe(config, state, criterion, options, len(data.class_names))
    if processes.is_main:
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")

    bad_images = resumed.get("bad_images", ()) if resumed else ()
    trainer = Trainer(
        config,
        processes,
        folder,
        data,
        preprocessing,
        criterion,
        state,
        freezer,
        device,
        summary,
        bad_images,
    )
    trainer.introduce()
    with utils.StopRequest() as stop:
        return trainer.fit(stop)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left; the host says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _what_helps(config: Config, device: torch.device) -> str:
    batch, accum = config.data.batch_size, config.optim.accum_steps
    batch = 1 if batch == "auto" else batch
    peak = ""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) / 2**30
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
        peak = f", peak {used:.1f} of {there:.1f} GiB"
    ways = ["--grad-checkpointing"]
    if batch > 1:
        smaller = f"--batch-size {batch // 2} --accum-steps {2 * accum} (the same update)"
        ways.insert(0, smaller)
    if config.optim.amp == "off" or device.type == "cpu":
        ways.append("--amp bf16")
    else:
        ways.append(f"a smaller --input-size than {config.model.input_size}")
    return (
        f"out of memory on {device} with --batch-size {batch}{peak}. Any of: {'; '.join(ways)}. "
        "With --resume auto the run goes on from its last checkpoint"
    )


def overfitting(config: Config) -> Config:
    """The sanity run of ``--overfit-batches``: nothing that keeps the loss from zero."""
    return config.replace(
        "--overfit-batches",
        mixup=0.0, cutmix=0.0, cutmix_minmax=None, smoothing=0.0, drop=0.0, drop_path=0.0,
        drop_block=None, repeated_aug=False, resplit=False, reprob=0.0, cosub=False,
        sampler="shuffle",
    )  # fmt: skip
