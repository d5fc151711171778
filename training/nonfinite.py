"""When a loss or gradient is not finite: where it began, on which images, and how to go on."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing.folder import load_newest, newer_checkpoints, remove
from distributed.processes import any_process, barrier, gather
from distributed.wrapping import local
from engine import Mixer, NonFinite, StepSettings, forward_loss
from errors import DivergedError
from optimization.freezing import set_mode
from optimization.state import TrainState
from pipeline.dataset import Batch
from training.build import Parts
from utils import write_text

log = logging.getLogger(__name__)

MAX_ROLLBACKS = 5


def recover(parts: Parts, folder: Path, failure: NonFinite, saved: Path | None) -> None:
    """Go back to the last checkpoint if ``--on-nonfinite rollback`` says so and it may help.

    One that a signal asked for doesn't count, so that a run that was stopped and resumed goes back
    to where one that was left alone would, unless there is no other.

    Args:
        parts: the run's; its state is put back.
        folder: the run's.
        failure: the update that failed.
        saved: the newest checkpoint, for the message.

    Raises:
        DivergedError: training is to stop; the message says where it went wrong.
    """
    state, options = parts.state, parts.config.optim
    culprit, where = _find_culprit(parts, failure.step)
    path = list_images(parts, folder, failure.step, failure.update, culprit)
    rate = state.schedule.rate(failure.update) * state.schedule.factor
    what = (
        f"loss or gradient not finite at update {failure.update} (epoch "
        f"{state.progress.epoch + 1}, step {failure.step + 1}), learning rate {rate:.3g}; "
        f"{where}; its images are listed in {path}"
    )
    rollbacks = state.progress.rollbacks + 1
    if options.on_nonfinite != "rollback" or rollbacks > MAX_ROLLBACKS:
        raise DivergedError(
            f"{what}. The last good weights are in {saved or 'no checkpoint yet'}. "
            "Lower --lr, or add --clip-grad 1, --amp off, or another --on-nonfinite"
        )
    barrier()
    source, content = load_newest(folder, scattered=parts.config.dist.fsdp, regular=True)
    state.load_state_dict(content)
    barrier()
    if parts.processes.is_main:
        # What a signal asked for further on is of a past that is given up.
        for path in newer_checkpoints(folder, state.progress.epoch, state.progress.samples):
            remove(path)
    state.progress.rollbacks = rollbacks
    if options.rollback_fp32_steps:
        # Twice as many each time: the trouble may lie a little further on.
        steps = options.rollback_fp32_steps * 2 ** (rollbacks - 1)
        state.progress.precise_until = state.progress.update + steps
        how = f"in full precision for {steps} updates"
    else:
        state.schedule.factor = 0.5**rollbacks
        how = f"with the rate times {state.schedule.factor:g}"
    log.warning("%s; going back to %s, %s", what, source, how)


def list_images(parts: Parts, folder: Path, step: int, update: int, culprit: str | None) -> Path:
    """Write down the images and the rate of an update of this process; returns the file."""
    state, data, processes = parts.state, parts.data, parts.processes
    first = _samples_before(parts, step) + processes.rank
    last = _samples_before(parts, step + parts.config.optim.accum_steps)
    indices = data.sampler.order(state.progress.epoch)[first : last : processes.world_size]
    path = folder / f"nonfinite-rank{processes.rank}.json"
    report = {
        "update": update,
        "epoch": state.progress.epoch + 1,
        "step": step + 1,
        "learning_rate": state.schedule.rate(update) * state.schedule.factor,
        "first_nonfinite": culprit,
        "images": [data.train.sample_id(i) for i in indices.tolist()],
    }
    text = json.dumps(report, indent=2) + "\n"
    parts.outputs.write(path, lambda path: write_text(path, text))
    return path


def _samples_before(parts: Parts, step: int) -> int:
    """Images of the epoch before ``step``, in a session resumed with other batches too."""
    progress = parts.state.progress
    width = parts.config.data.batch_size * parts.processes.world_size
    return progress.samples + (step - progress.step) * width


def _find_culprit(parts: Parts, step: int) -> tuple[str | None, str]:
    """Repeat the failed update: what goes wrong first here, and on which processes."""
    batches = parts.data.batches(parts.state.progress.epoch, _samples_before(parts, step))
    for offset, batch in enumerate(itertools.islice(batches, parts.settings.accum_steps)):
        culprit = first_nonfinite(
            parts.state, parts.criterion, batch, parts.settings, step + offset, parts.mixer_now
        )
        culprits = gather(culprit)
        if any(culprits):
            return culprit, _locations(culprits)
    return None, "it did not come again on a second try"


def _locations(culprits: list[str | None]) -> str:
    """Which process met what, e.g. ``first in the loss (process 1)``."""
    if len(culprits) == 1 or None not in culprits and len(set(culprits)) == 1:
        return f"first in {culprits[0]}"
    met = [f"{what} (process {rank})" for rank, what in enumerate(culprits) if what]
    return f"first in {'; '.join(met[:4])}{'; …' if len(met) > 4 else ''}"


def first_nonfinite(
    state: TrainState,
    criterion: nn.Module,
    batch: Batch,
    settings: StepSettings,
    step: int,
    mixer: Mixer | None = None,
) -> str | None:
    """Repeat the step of ``batch`` and name the first thing in it that is not finite, or None.

    To be called by all processes, which look at their own batches; each gets its own answer, and
    all stop looking once one has found something.
    """

    def first(found: str | None) -> bool:
        nonlocal culprit
        culprit = culprit or found
        return any_process(culprit is not None)

    culprit: str | None = None
    if first(None if torch.isfinite(settings.inputs(batch)).all() else "the input images"):
        return culprit
    bad = _nonfinite_names(state.model, lambda p: p)
    if first(f"the weight {bad[0]}" if bad else None):
        return culprit
    state.optimizer.zero_grad(set_to_none=True)
    with _watched_outputs(state.model) as found:
        set_mode(state.model, state.model, settings.train_mode)
        loss = forward_loss(state, criterion, batch, settings, step, mixer, net=state.model)
        if not found and not torch.isfinite(loss):
            found.append("the loss, of outputs that are finite")
        if first(found[0] if found else None):
            return culprit
        loss.backward()
    # Backward runs from the last layer to the first: the last bad one was the first to go wrong.
    bad = _nonfinite_names(state.model, lambda p: p.grad)
    state.optimizer.zero_grad(set_to_none=True)
    first(f"the gradient of {bad[-1]}" if bad else None)
    return culprit


def _nonfinite_names(model: nn.Module, part: Callable[[nn.Parameter], Tensor | None]) -> list[str]:
    """Names of the parameters of which a part of this process is not finite."""
    parts = {n: part(p) for n, p in model.named_parameters()}
    parts = {n: local(x) for n, x in parts.items() if x is not None}
    return [n for n, x in parts.items() if not torch.isfinite(x).all()]


@contextmanager
def _watched_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the outputs of layers that are not finite are listed, in their order."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(f"the output of {name} ({type(module).__name__})")

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
