"""The largest batch that fits, and what helps when none does."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from checkpointing.folder import holds_run
from config import Config
from distributed.processes import Processes, any_process
from engine import set_mode
from errors import OptionError, OutOfMemoryError
from training.build import Parts

log = logging.getLogger(__name__)


class BatchTooLarge(torch.OutOfMemoryError):
    """A step on grey images ran out of memory, on some process; raised on all."""


def train_with_largest_batch(
    config: Config,
    folder: Path,
    processes: Processes,
    device: torch.device,
    train: Callable[[Config], int],
) -> int:
    """``train`` with the largest batch that fits, and accumulation up to ``--effective-batch``."""
    effective, world = config.data.effective_batch, processes.world_size
    if effective % world:
        raise OptionError("effective_batch", f"{effective} can't be shared by {world} processes")
    share = effective // world
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
    classes, side = len(parts.data.class_names), settings.input_size
    images = settings.place(torch.zeros(settings.batch_size, 3, side, side))
    targets = torch.full((settings.batch_size, classes), 1 / classes, device=settings.device)
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left; the host says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
        ways.append(f"a smaller --input-size than {config.model.input_size}")
    return (
        f"out of memory on {device} with --batch-size {batch}{peak}. Any of: {'; '.join(ways)}. "
        "With --resume auto the run goes on from its last checkpoint"
    )
