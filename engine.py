"""One epoch of training, one pass of evaluation.

The engine gets objects and never the configuration. It doesn't wait for the device: losses and
flags stay there and are read every ``log_interval`` updates. What is random in a step is seeded
from (seed, epoch, step, rank), so the step is the same whatever ran before it.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from augmentation.batch import Plan
from distributed.processes import in_step, world_size
from distributed.wrapping import is_sharded, no_sync
from optimization.clipping import clip_gradients
from optimization.counts import Counts, RealCounts
from optimization.freezing import set_mode
from optimization.groups import classifier_parameters
from optimization.guard import Guard
from optimization.meter import Meter
from optimization.multilabel import MultiLabelCounts, Result
from optimization.state import TrainState
from pipeline.clock import Clock
from pipeline.dataset import Batch
from pipeline.prefetch import prefetch
from utils import derive_seed, peak_memory, seed_all


class Mixer(Protocol):
    """Mixes the images of a batch, see augmentation.mixing.Mixer."""

    def __call__(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class StepSettings:
    """How a step is made."""

    device: torch.device
    """Where the model is."""
    batch_size: int = 1
    """Images per batch and process."""
    seed: int = 0
    """Of dropout, stochastic depth and mixing."""
    rank: int = 0
    """Of this process, so that processes drop different units."""
    amp: torch.dtype | None = None
    """Autocast type, None for float32."""
    accum_steps: int = 1
    """Batches whose gradients make one update."""
    clip_grad: float | None = None
    """Limit of the gradient, None for no limit."""
    clip_mode: str = "norm"
    """norm, value or agc."""
    train_mode: bool = True
    """False leaves the model in evaluation mode."""
    on_nonfinite: str = "stop"
    """skip goes on after a loss or gradient that is not finite, else NonFinite is raised."""
    log_interval: int = 50
    """Updates between reads from the device."""
    channels_last: bool = False
    """Memory layout of the images."""
    in_chans: int = 3
    size: tuple[int, int] = (224, 224)
    """Height and width of the images, pixels."""
    prepare: Callable[[Tensor, Plan | None], Tensor] | None = None
    """Makes normalised images of uint8 or uint16 ones and their plan, on the device."""
    macs: int = 0
    """Multiply-accumulates of the forward pass of one image."""
    peak: float | None = None
    """Floating-point operations per second that the device can do at best, if known."""

    def autocast(self, precise: bool = False) -> contextlib.AbstractContextManager[None]:
        """Mixed precision, unless there is none or ``precise`` turns it off."""
        enabled = self.amp is not None and not precise
        return torch.autocast(self.device.type, self.amp, enabled=enabled)

    def place(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device; float images in the model's memory layout."""
        images = self.channels_last and tensor.ndim == 4 and tensor.is_floating_point()
        layout = {"memory_format": torch.channels_last} if images else {}
        return tensor.to(self.device, non_blocking=True, **layout)

    def inputs(self, batch: Batch) -> Tensor:
        """The images of ``batch`` as the model takes them."""
        images = self.place(batch.images)
        if not images.is_floating_point():
            images = self.place(self.prepare(images, batch.plan))
        return images


@dataclass(frozen=True)
class StepReport:
    """The state of training, every ``log_interval`` updates."""

    epoch: int
    step: int
    """Batches done in this epoch."""
    steps: int
    """Batches of the epoch."""
    update: int
    """Updates since the beginning."""
    loss: float
    """Mean over all processes since the last report."""
    lr: float
    grad_norm: float
    images_per_second: float
    """Throughput of all processes together."""
    data_wait: float
    """Share of the time spent waiting for images."""
    step_seconds: float
    """Of a batch, the wait included."""
    memory: int
    """Peak bytes: allocated on a CUDA device, else of this process."""
    utilisation: float | None
    """Model-FLOPs utilisation (arXiv:2204.02311, appendix B); None where the peak isn't known."""
    warm_up: bool
    """Whether the first update of a session is in it, with all that is done only once."""


class StepRequest(Enum):
    """What training is to do after an update."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2


class NonFinite(Exception):
    """A loss or gradient was not finite; nothing was updated from ``step`` on.

    Attributes:
        step: first batch, within its epoch, of the update that failed.
        update: number of that update.
    """

    def __init__(self, step: int, update: int) -> None:
        super().__init__(f"loss or gradient not finite at update {update}")
        self.step = step
        self.update = update


class Hooks:
    """What happens around the steps of an epoch; this base class does nothing."""

    def report(self, report: StepReport) -> None:
        """Called every ``log_interval`` updates, after the first one and at the end."""

    def request(self) -> StepRequest:
        """What to do next; asked after each update, by all processes together."""
        return StepRequest.CONTINUE

    def save(self) -> None:
        """Called, with all counters up to date, when that was requested."""

    def skipped(self, count: int, step: int, update: int) -> None:
        """``count`` updates were left out since the last read; ``step``, ``update``: the first."""


# --- training -------------------------------------------------------------------------------------


def train_one_epoch(
    state: TrainState,
    criterion: nn.Module,
    batches: Iterable[Batch],
    settings: StepSettings,
    *,
    steps: int,
    mixer: Mixer | None = None,
    hooks: Hooks | None = None,
) -> bool:
    """Train on ``batches`` from where ``state.progress`` stands to the end of the epoch.

    Args:
        state: model, optimiser and counters; changed in place. The counters always stand at an
            update, never inside a window of accumulated batches.
        criterion: (images, outputs, targets) -> scalar loss.
        batches: those of the epoch that are still to come.
        settings: how a step is made.
        steps: batches of the whole epoch, those before a resume included.
        mixer: mixes images and targets on the device.
        hooks: reports, requests, saving.

    Returns whether the epoch was finished. Raises NonFinite if a loss or gradient was not finite,
    unless ``settings.on_nonfinite`` is skip; the weights are those before that update.
    """
    hooks, progress = hooks or Hooks(), state.progress
    set_mode(state.net, state.model, settings.train_mode)
    reporter = _Reporter(state, settings, steps, hooks, copies=criterion.copies)
    step, statistics = progress.step, []
    try:
        for batch in reporter.clock.watch(prefetch(batches, settings.device, settings.place)):
            # The last window of an epoch may hold fewer batches.
            start = step - step % settings.accum_steps
            window = min(settings.accum_steps, steps - start)
            completes = step - start == window - 1
            if step == start:
                statistics = _begin_window(state, reporter.meter, settings)
            with contextlib.nullcontext() if completes else no_sync(state.net):
                loss = forward_loss(state, criterion, batch, settings, step, mixer, reporter.meter)
                scaled = state.scaler.scale(loss) if state.scaler else loss
                (scaled / window).backward()
            reporter.meter.add_loss(loss.detach())
            step += 1
            if not completes:
                continue
            _update(state, reporter.meter, reporter.guard, settings, start, statistics)
            reporter.after_update(step)
            request = hooks.request()
            if request is StepRequest.SAVE:
                reporter.read()
                hooks.save()
            elif request is StepRequest.STOP:
                break
        if step >= steps:
            reporter.report()
    except BaseException:
        reporter.leave(step, statistics)
        raise
    reporter.read()
    return progress.step >= steps


class _Reporter:
    """Keeps the counters, reads the device every log interval and reports."""

    def __init__(
        self, state: TrainState, settings: StepSettings, steps: int, hooks: Hooks, *, copies: int
    ) -> None:
        self.state, self.settings, self.hooks = state, settings, hooks
        self.progress = state.progress
        self.steps = steps
        self.copies = copies
        self.meter = Meter(settings.device)
        self.guard = Guard(
            state.optimizer,
            state.scaler,
            sticky=settings.on_nonfinite != "skip",
            waits=settings.device.type != "cuda",
        )
        self.clock = Clock(warm_up=not state.warm)
        self.world = world_size()
        self._read_at = self.progress.update

    def after_update(self, step: int) -> None:
        """Count the batches up to ``step``, and report if it is time."""
        progress, settings = self.progress, self.settings
        progress.samples += (step - progress.step) * settings.batch_size * self.world
        progress.step = step
        if progress.update % settings.log_interval == 0 or progress.update == 1:
            self.report()
        if not self.state.warm:
            self.state.warm = True
            self.clock.lap()

    def leave(self, step: int, statistics: list[tuple[Tensor, Tensor]]) -> None:
        """After a failure or a signal: stand at the last update again, which can be saved."""
        if step > self.progress.step:
            self.meter.drop()
            for buffer, before in statistics:
                buffer.copy_(before)
        if self.world == 1:  # the others are elsewhere
            self.read()

    def read(self) -> None:
        """Wait for the device; raise NonFinite, or report the updates that were left out."""
        if self.progress.update == self._read_at:
            return
        self._read_at = self.progress.update
        bad, bad_step, bad_update = self.meter.read_into(self.progress)
        self.guard.settle()
        if bad and self.settings.on_nonfinite != "skip":
            raise NonFinite(bad_step, bad_update)
        if bad:
            self.hooks.skipped(bad, bad_step, bad_update)

    def report(self) -> None:
        self.read()
        progress, settings = self.progress, self.settings
        if not progress.recent_count:
            return
        lap = self.clock.lap()
        # A backward pass takes twice the operations of a forward pass, each of two operations.
        work = 6 * settings.macs * self.copies * lap.images_per_second
        self.hooks.report(
            StepReport(
                epoch=progress.epoch,
                step=progress.step,
                steps=self.steps,
                update=progress.update,
                loss=progress.recent_sum / progress.recent_count,
                lr=self.state.schedule.last,
                grad_norm=self.meter.last_norm,
                images_per_second=lap.images_per_second * self.world,
                data_wait=lap.data_wait,
                step_seconds=lap.step_seconds,
                memory=peak_memory(settings.device),
                utilisation=work / settings.peak if settings.peak else None,
                warm_up=lap.warm_up,
            )
        )
        progress.recent_sum, progress.recent_count = 0.0, 0


def forward_loss(
    state: TrainState,
    criterion: nn.Module,
    batch: Batch,
    settings: StepSettings,
    step: int,
    mixer: Mixer | None,
    meter: Meter | None = None,
    net: nn.Module | None = None,
) -> Tensor:
    """The loss of a batch: a function of the weights, the batch and (seed, epoch, step, rank)."""
    epoch = state.progress.epoch
    seed_all(derive_seed(settings.seed, "step", epoch, step, settings.rank))
    images, targets = settings.inputs(batch), settings.place(batch.targets)
    if mixer is not None:
        first = int(batch.positions.numpy()[0])
        images, targets = mixer(images, targets, derive_seed(settings.seed, "mix", epoch, first))
    splits = len(images) // len(targets)
    if criterion.copies > 1:
        images = images.repeat(criterion.copies, 1, 1, 1)  # (copies × B, C, H, W)
    with settings.autocast(precise=state.progress.update < state.progress.precise_until):
        outputs = (net or state.net)(images)
        if meter is not None:
            meter.add_answers(outputs, targets)
        if splits > 1:
            targets = targets.repeat(splits, *[1] * (targets.ndim - 1))
        return criterion(images, outputs, targets)


def _begin_window(
    state: TrainState, meter: Meter, settings: StepSettings
) -> list[tuple[Tensor, Tensor]]:
    """Begin an update that may not come about: batch-norm statistics and their values now."""
    state.optimizer.zero_grad(set_to_none=True)
    if settings.accum_steps > 1:
        meter.mark()
    elif settings.on_nonfinite != "skip":
        return []
    return [(b, b.clone()) for b in state.model.buffers()]


def _update(
    state: TrainState,
    meter: Meter,
    guard: Guard,
    settings: StepSettings,
    step: int,
    statistics: list[tuple[Tensor, Tensor]],
) -> None:
    """Clip, check, step the optimiser and the moving average."""
    progress = state.progress
    state.schedule.apply(state.optimizer, progress.update)
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    norm = clip_gradients(
        state.model.parameters(),
        settings.clip_grad,
        settings.clip_mode,
        spared=classifier_parameters(state.model) if settings.clip_mode == "agc" else (),
    )
    sticky = settings.on_nonfinite != "skip"
    bad = meter.check(norm, step, progress.update, sticky=sticky, scaled=state.scaler is not None)
    guard.step(bad)
    if not sticky:
        for buffer, before in statistics:
            buffer.copy_(torch.where(bad, before, buffer))
    if state.ema:
        state.ema.step(progress.update)
    progress.update += 1


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: StepSettings,
    *,
    num_classes: int,
    batch_size: int,
    shared: bool = True,
    progress: Callable[[int], None] | None = None,
    real: RealCounts | None = None,
    counts: Counts | MultiLabelCounts | None = None,
) -> Result:
    """Evaluate ``model`` on ``batches``, each process on its own share.

    Counts are integers and so are the summed losses (optimization/counts.py), and every batch is
    filled up to the same size, for the last digit of a product of matrices depends on their shape:
    the result doesn't depend on how the images are shared out.

    Args:
        model: gives (B, num_classes) logits in evaluation mode.
        batches: of this process; their number may differ between processes.
        settings: device, autocast and layout.
        num_classes: C.
        batch_size: images of a full batch.
        shared: each process has a share, which are added up; else each has the whole set.
        progress: called with the number of batches done.
        real: counts the same answers by several right classes per image.
        counts: what counts the answers; None: one class per image.
    """
    model.eval()
    counts = counts or Counts(num_classes, settings.device)
    together = is_sharded(model)
    for done, batch in enumerate(in_step(batches) if together else batches, start=1):
        if batch is None or not len(batch.targets):
            # Nothing to count, but a sharded model needs every process for a forward pass.
            if together:
                with settings.autocast():
                    model(settings.place(torch.zeros(1, settings.in_chans, *settings.size)))
            continue
        images, targets = settings.inputs(batch), settings.place(batch.targets)
        filling = batch_size - len(targets)
        if filling > 0:
            images = nn.functional.pad(images, (*[0] * 7, filling))  # keeps the memory layout
        with settings.autocast():
            outputs = model(images)
        outputs = outputs[: len(targets)].float()
        counts.add(outputs, targets)
        if real:
            real.add(outputs, settings.place(batch.indices))
        if progress:
            progress(done)
    if together:
        model.reshard()
    if shared:
        counts.add_up()
        if real:
            real.add_up()
    return counts.result()
