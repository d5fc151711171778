"""The largest batch that fits, and what helps when none does."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from architectures.sizes import size_text
from checkpointing.folder import holds_run
from config import Config
from distributed.processes import Processes, any_process
from errors import OptionError, OutOfMemoryError, lacks_host_memory
from optimization.freezing import set_mode
from pipeline.loader import TooFewImagesError
from training.build import Parts

log = logging.getLogger(__name__)


_UPDATES = 4  # per epoch at least, where --effective-batch is not asked for


class BatchTooLarge(torch.OutOfMemoryError):
    """A step on grey images ran out of memory, on some process; raised on all."""


def train_with_largest_batch(
    config: Config,
    folder: Path,
    processes: Processes,
    device: torch.device,
    train: Callable[[Config], int],
) -> int:
    """``train`` with the largest batch that fits, and accumulation up to ``--effective-batch``.

    Where an epoch is too short for the default of that, updates are as small as give an epoch four
    of them at least.
    """
    effective, world = config.data.effective_batch, processes.world_size
    if effective % world:
        raise OptionError("effective_batch", f"{effective} can't be shared by {world} processes")
    try:
        return _largest_that_fits(config, effective // world, folder, processes, device, train)
    except TooFewImagesError as error:
        images = error.images
    if "effective_batch" in config.explicit():
        raise OptionError(
            "effective_batch",
            f"{effective} images per update are more than an epoch has, {images * world}: lower it",
        )
    share = 1 << max(0, (images // _UPDATES).bit_length() - 1)
    log.info(
        "batch    an epoch has %d images: %d per update (--effective-batch)",
        images * world,
        share * world,
    )
    return _largest_that_fits(config, share, folder, processes, device, train)


def _largest_that_fits(
    config: Config,
    share: int,
    folder: Path,
    processes: Processes,
    device: torch.device,
    train: Callable[[Config], int],
) -> int:
    """``train`` with ``share`` images per update and process, as many of them at a time as fit."""
    # The host's memory ends runs without a warning: what is usual fits there.
    most = share if device.type == "cuda" else min(share, 64)
    sizes = [size for size in range(most, 0, -1) if share % size == 0]
    for size in sizes:
        chosen = config.replace("--batch-size auto", batch_size=size, accum_steps=share // size)
        if size != sizes[0] and holds_run(folder):
            # It fitted at first and no longer did: on from the last checkpoint.
            chosen = chosen.replace("--batch-size auto", resume="auto")
        try:
            return train(chosen)
        except RuntimeError as error:
            # Where several processes train, the others wait in an exchange, unless it was probed.
            alone = not processes.distributed or isinstance(error, BatchTooLarge)
            if not (alone and is_out_of_memory(error)) or size == sizes[-1]:
                raise
            # The error holds on to everything on the device.
            error.__traceback__ = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("batch    %d images at a time don't fit %s: fewer", size, device)
    raise AssertionError("unreachable: the last size returns or raises")


def probe(parts: Parts) -> None:
    """Raise BatchTooLarge, on all processes, unless a step on grey images fits everywhere.

    Nothing of the state changes. The optimiser's two moments, which come with the first update, are
    counted by memory of their size.
    """
    fits = True
    try:
        moments = [torch.zeros_like(p) for p in parts.state.model.parameters() for _ in range(2)]
        rehearse(parts)
        del moments
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    if any_process(not fits):
        raise BatchTooLarge("too many images at a time")


def rehearse(parts: Parts) -> None:
    """A forward and backward pass on grey images, to see whether they fit; changes nothing."""
    state, criterion, settings = parts.state, parts.criterion, parts.settings
    classes = len(parts.data.class_names)
    batch = settings.batch_size * max(1, parts.config.augment.aug_splits)
    images = settings.place(torch.zeros(batch, settings.in_chans, *settings.size))
    targets = torch.full((batch, classes), 1 / classes, device=settings.device)
    kept = [(b, b.clone()) for b in state.model.buffers()]
    set_mode(state.model, state.model, settings.train_mode)
    try:
        if criterion.copies > 1:
            images = images.repeat(criterion.copies, 1, 1, 1)
        with settings.autocast():
            loss = criterion(images, state.model(images), targets)
        loss.backward()
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in kept:
            buffer.copy_(before)


def refuse_single_images(parts: Parts) -> None:
    """Raise OptionError if the model can't be trained on one image at a time, for want of batch
    statistics; changes nothing."""
    settings, model = parts.settings, parts.state.model
    images = settings.batch_size * parts.criterion.copies * max(1, parts.config.augment.aug_splits)
    alone = images == 1 and settings.train_mode
    # Statistics of all processes have several images.
    shared = any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    if not alone or shared:
        return
    image = settings.place(torch.zeros(1, settings.in_chans, *settings.size))
    kept = [(b, b.clone()) for b in model.buffers()]
    set_mode(model, model, True)
    try:
        with torch.no_grad(), settings.autocast():
            model(image)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise OptionError(
            "batch_size",
            "1 image has no batch statistics for the batch norm of "
            f"{parts.config.model.model} at {size_text(settings.size)} pixels: 2 or more",
        ) from None
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left; the host says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or lacks_host_memory(error)


@contextlib.contextmanager
def out_of_memory_advice(config: Config, device: torch.device) -> Iterator[None]:
    """Inside, an out-of-memory error becomes one line that says what helps."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(what_helps(config, device)) from None


def what_helps(config: Config, device: torch.device) -> str:
    """What to change after running out of memory, the easiest first."""
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
        ways.append(f"a smaller --input-size than {size_text(config.model.size)}")
    return (
        f"out of memory on {device} with --batch-size {batch}{peak}. Any of: {'; '.join(ways)}. "
        "With --resume auto the run goes on from its last checkpoint"
    )
