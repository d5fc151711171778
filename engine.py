"""One epoch of training, one pass of evaluation.

The engine gets objects and never the configuration. It doesn't wait for the device: losses and
flags stay there and are read every ``log_interval`` steps. What is random in a step is seeded from
(seed, epoch, step, rank), so the step is the same whatever ran before it.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from batch_augment import Plan
from datasets import Batch
from optim import (
    classifier_parameters,
    clip_gradients,
    frozen_norms,
    optimizer_supports_found_inf,
)
from state import Progress, TrainState
from utils import all_reduce_sum, any_process, derive_seed, peak_memory, seed_all

# Evaluation adds up losses as integers of this fraction: sums of integers don't depend on their
# order, so every number of processes gives the same digits.
LOSS_UNIT = 2.0**-20


class Mixer(Protocol):
    """Mixes the pictures of a batch, see augment.Mixer."""

    def __call__(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class StepOptions:
    """How a step is made.

    Attributes:
        device: where the model is.
        batch_size: places of the epoch that a batch of one process takes.
        seed: of dropout, stochastic depth and mixing.
        rank: of this process, so that processes drop different units.
        amp: autocast type, None for float32.
        accum_steps: batches whose gradients make one update.
        clip_grad: limit of the gradient, None for no limit.
        clip_mode: norm, value or agc.
        train_mode: False leaves the model in evaluation mode.
        on_nonfinite: skip goes on after a loss or gradient that isn't finite, else raise NonFinite.
        log_interval: updates between reads from the device.
        channels_last: memory layout of the pictures.
        input_size: height and width of the pictures.
        prepare: makes normalised pictures of uint8 ones and their plan, on the device.
        macs: multiply-accumulates of a picture's forward pass.
        peak: floating-point operations a second that the device can do at best, if known.
    """

    device: torch.device
    batch_size: int = 1
    seed: int = 0
    rank: int = 0
    amp: torch.dtype | None = None
    accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    train_mode: bool = True
    on_nonfinite: str = "stop"
    log_interval: int = 50
    channels_last: bool = False
    input_size: int = 224
    prepare: Callable[[Tensor, Plan | None], Tensor] | None = None
    macs: int = 0
    peak: float | None = None

    def autocast(self, precise: bool = False) -> contextlib.AbstractContextManager[None]:
        """Mixed precision, unless there is none or ``precise`` wants it off."""
        enabled = self.amp is not None and not precise
        return torch.autocast(self.device.type, self.amp, enabled=enabled)

    def place(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device; float pictures in the model's memory layout."""
        pictures = self.channels_last and tensor.ndim == 4 and tensor.is_floating_point()
        layout = {"memory_format": torch.channels_last} if pictures else {}
        return tensor.to(self.device, non_blocking=True, **layout)

    def inputs(self, batch: Batch) -> Tensor:
        """The pictures of ``batch`` as the model takes them."""
        images = self.place(batch.images)
        if images.dtype == torch.uint8:
            images = self.place(self.prepare(images, batch.plan))
        return images


@dataclass(frozen=True)
class StepReport:
    """What training says of itself every ``log_interval`` updates."""

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
    """Of all processes together."""
    data_wait: float
    """Share of the time spent waiting for pictures."""
    step_seconds: float
    """Of a batch, the wait included."""
    memory: int
    """Peak bytes: allocated on a CUDA device, else of this process."""
    utilisation: float | None
    """Model-FLOPs utilisation (arXiv:2204.02311, appendix B); None where the peak isn't known."""
    warm_up: bool
    """Whether the first update of a session is in it, with all that is done only once."""


class Wish(Enum):
    """What is wanted of training after an update."""

    GO = 0
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


class _Meter:
    """Sums that stay on the device between reads."""

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=kind, device=device)  # loss, number of losses, bad updates
        self.halted = torch.zeros((), dtype=torch.bool, device=device)
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=device)
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)  # step, update
        self.grad_norm = torch.zeros((), device=device)
        self.last_norm = 0.0

    def add_loss(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss)
        self.sums[0] += torch.where(finite, loss, 0.0)
        self.sums[1] += finite
        self.bad_loss |= ~finite

    def judge(
        self, grad_norm: Tensor, step: int, update: int, *, sticky: bool, scaled: bool
    ) -> Tensor:
        """Whether to leave out the update, agreed on by all processes; a bool on the device.

        ``sticky`` leaves out all later ones too. With a loss scaler (``scaled``) an infinite
        gradient is the scaler's business.
        """
        bad = self.bad_loss if scaled else self.bad_loss | ~torch.isfinite(grad_norm)
        if dist.is_initialized():
            votes = bad.to(torch.int32)
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            bad = votes.bool()
        here = torch.tensor([step, update]).to(self.first_bad.device, non_blocking=True)
        self.first_bad = torch.where(bad & (self.first_bad < 0), here, self.first_bad)
        self.sums[2] += bad
        self.bad_loss = torch.zeros_like(self.bad_loss)
        self.grad_norm = grad_norm.detach()
        if sticky:
            self.halted |= bad
            return self.halted
        return bad

    def read_into(self, progress: Progress) -> tuple[int, int, int]:
        """Wait for the device and move the sums into ``progress``.

        Returns the number of bad updates, and the first one's step and number.
        """
        sums = all_reduce_sum(self.sums.clone())
        world = dist.get_world_size() if dist.is_initialized() else 1
        parts = [sums, self.first_bad.to(sums.dtype), self.grad_norm.to(sums.dtype)[None]]
        loss, count, bad, step, update, self.last_norm = torch.cat(parts).tolist()
        self.sums.zero_()
        self.first_bad.fill_(-1)
        progress.loss_sum += loss
        progress.recent_sum += loss
        progress.loss_count += int(count)
        progress.recent_count += int(count)
        progress.skipped += int(bad) // world
        return int(bad) // world, int(step), int(update)


def train_one_epoch(
    state: TrainState,
    criterion: nn.Module,
    batches: Iterable[Batch],
    options: StepOptions,
    *,
    steps: int,
    mixer: Mixer | None = None,
    report: Callable[[StepReport], None] = lambda report: None,
    wish: Callable[[], Wish] = lambda: Wish.GO,
    save: Callable[[], None] = lambda: None,
    skipped: Callable[[int, int, int], None] = lambda count, step, update: None,
) -> bool:
    """Train on ``batches`` from where ``state.progress`` stands to the end of the epoch.

    Args:
        state: model, optimiser and counters; changed in place. The counters always stand at an
            update, never inside a window of accumulated batches.
        criterion: (images, outputs, targets) -> scalar loss.
        batches: those of the epoch that are still to come.
        options: how a step is made.
        steps: batches of the whole epoch, those before a resume included.
        mixer: mixes pictures and targets on the device.
        report: called every ``log_interval`` updates, after the first one and at the end.
        wish: asked after each update, by all processes together.
        save: called, with all counters up to date, when that was the wish.
        skipped: called with the number of updates left out since the last read, and the first
            one's step and number.

    Returns:
        Whether the epoch was finished.

    Raises:
        NonFinite: a loss or gradient was not finite and ``options.on_nonfinite`` is not skip. The
            weights are those before that update.
    """
    progress = state.progress
    set_mode(state.net, state.model, options.train_mode)
    meter = _Meter(options.device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    clock = _Clock(warm_up=not state.warm)
    read_at = progress.update

    def read() -> None:
        nonlocal read_at
        if progress.update == read_at:
            return
        read_at = progress.update
        bad, bad_step, bad_update = meter.read_into(progress)
        if bad and options.on_nonfinite != "skip":
            raise NonFinite(bad_step, bad_update)
        if bad:
            skipped(bad, bad_step, bad_update)

    def tell() -> None:
        read()
        if not progress.recent_count:
            return
        lap = clock.lap()
        # A backward pass takes twice the operations of a forward pass, each of two operations.
        work = 6 * options.macs * criterion.copies * lap.images_per_second
        report(
            StepReport(
                epoch=progress.epoch,
                step=progress.step,
                steps=steps,
                update=progress.update,
                loss=progress.recent_sum / progress.recent_count,
                lr=state.schedule.last,
                grad_norm=meter.last_norm,
                images_per_second=lap.images_per_second * world,
                data_wait=lap.data_wait,
                step_seconds=lap.step_seconds,
                memory=peak_memory(options.device),
                utilisation=work / options.peak if options.peak else None,
                warm_up=lap.warm_up,
            )
        )
        progress.recent_sum, progress.recent_count = 0.0, 0

    step = progress.step
    try:
        for batch in clock.watch(_ahead(batches, options)):
            # The last window of an epoch may hold fewer batches.
            start = step - step % options.accum_steps
            window = min(options.accum_steps, steps - start)
            if step == start:
                state.optimizer.zero_grad(set_to_none=True)
                statistics = _statistics(state, options)
            completes = step - start == window - 1
            with contextlib.nullcontext() if completes else parallel.no_sync(state.net):
                loss = _forward(state, criterion, batch, options, step, mixer)
                scaled = state.scaler.scale(loss) if state.scaler else loss
                (scaled / window).backward()
            meter.add_loss(loss.detach())
            step += 1
            if not completes:
                continue
            _update(state, meter, options, start, statistics)
            progress.samples += (step - progress.step) * options.batch_size * world
            progress.step = step
            if progress.update % options.log_interval == 0 or progress.update == 1:
                tell()
            if not state.warm:
                state.warm = True
                clock.lap()
            wanted = wish()
            if wanted is Wish.SAVE:
                read()
                save()
            elif wanted is Wish.STOP:
                break
        if step >= steps:
            tell()
    finally:
        # Also where a loader failed, so that what was trained can be saved.
        read()
    return progress.step >= steps


def _forward(
    state: TrainState,
    criterion: nn.Module,
    batch: Batch,
    options: StepOptions,
    step: int,
    mixer: Mixer | None,
    net: nn.Module | None = None,
) -> Tensor:
    """The loss of a batch: a function of the weights, the batch and (seed, epoch, step, rank)."""
    epoch = state.progress.epoch
    seed_all(derive_seed(options.seed, "step", epoch, step, options.rank))
    images, targets = options.inputs(batch), options.place(batch.targets)
    if mixer is not None:
        first = int(batch.positions.numpy()[0])
        images, targets = mixer(images, targets, derive_seed(options.seed, "mix", epoch, first))
    if criterion.copies > 1:
        images = images.repeat(criterion.copies, 1, 1, 1)  # (copies × B, C, H, W)
    with options.autocast(precise=state.progress.update < state.progress.precise_until):
        return criterion(images, (net or state.net)(images), targets)


def rehearse(
    state: TrainState,
    criterion: nn.Module,
    options: StepOptions,
    batch_size: int,
    num_classes: int,
) -> None:
    """A forward and backward pass on grey pictures, to see whether they fit; changes nothing."""
    side = options.input_size
    images = options.place(torch.zeros(batch_size, 3, side, side))
    targets = torch.full((batch_size, num_classes), 1 / num_classes, device=options.device)
    kept = [(b, b.clone()) for b in state.model.buffers()]
    set_mode(state.model, state.model, options.train_mode)
    try:
        if criterion.copies > 1:
            images = images.repeat(criterion.copies, 1, 1, 1)
        with options.autocast():
            loss = criterion(images, state.model(images), targets)
        loss.backward()
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in kept:
            buffer.copy_(before)


def _statistics(state: TrainState, options: StepOptions) -> list[tuple[Tensor, Tensor]]:
    """Batch-norm statistics and their values now, for an update that may be left out."""
    if options.on_nonfinite != "skip":
        return []
    return [(b, b.clone()) for b in state.model.buffers() if b.is_floating_point()]


def _update(
    state: TrainState,
    meter: _Meter,
    options: StepOptions,
    step: int,
    statistics: list[tuple[Tensor, Tensor]],
) -> None:
    """Clip, check, step the optimiser and the moving average."""
    optimizer, scaler, progress = state.optimizer, state.scaler, state.progress
    state.schedule.apply(optimizer, progress.update)
    if scaler:
        scaler.unscale_(optimizer)
    norm = clip_gradients(
        state.model.parameters(),
        options.clip_grad,
        options.clip_mode,
        spared=classifier_parameters(state.model) if options.clip_mode == "agc" else (),
    )
    sticky = options.on_nonfinite != "skip"
    bad = meter.judge(norm, step, progress.update, sticky=sticky, scaled=scaler is not None)
    if scaler:
        # The scaler waits for the device anyway, and must not adapt to a loss that is not finite.
        if not bool(bad):
            scaler.step(optimizer)
            scaler.update()
        else:
            scaler.update(scaler.get_scale())
    elif optimizer_supports_found_inf(optimizer):
        # The fused kernels look at this flag on the device, so the host needn't wait for it.
        first = optimizer.param_groups[0]["params"][0]
        optimizer.found_inf = parallel.flag_like(bad.to(torch.float32), first)
        optimizer.step()
        del optimizer.found_inf
    elif not bool(bad):
        optimizer.step()
    for buffer, before in statistics:
        buffer.copy_(torch.where(bad, before, buffer))
    if state.ema:
        state.ema.step(progress.update)
    progress.update += 1


def set_mode(net: nn.Module, model: nn.Module, train_mode: bool = True) -> None:
    """Training mode, but for batch norms that are frozen: those keep their statistics too."""
    net.train(train_mode)
    for norm in frozen_norms(model):
        norm.eval()


def _ahead(batches: Iterable[Batch], options: StepOptions) -> Iterator[Batch]:
    """The batches; on CUDA the next one is copied while this one is computed, on another stream."""
    if options.device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(options.device)
    coming: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            images, targets = options.place(batch.images), options.place(batch.targets)
        if coming is not None:
            yield coming
        coming = batch._replace(images=images, targets=targets)
        here = torch.cuda.current_stream(options.device)
        here.wait_stream(stream)
        for tensor in (images, targets):
            # The other stream must not use their memory again before this one is done.
            tensor.record_stream(here)
    if coming is not None:
        yield coming


class _Lap(NamedTuple):
    images_per_second: float
    data_wait: float
    step_seconds: float
    warm_up: bool


class _Clock:
    """Splits the time into waiting for pictures and the rest.

    The first lap of a session holds the ``warm_up``: compilation, allocation, the start of loaders.
    """

    def __init__(self, warm_up: bool) -> None:
        self.start = time.perf_counter()
        self.warm_up = warm_up
        self.waited = 0.0
        self.images = 0
        self.steps = 0

    def watch(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.images += len(batch.targets)
            self.steps += 1
            yield batch

    def lap(self) -> _Lap:
        """What happened since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        lap = _Lap(
            self.images / seconds, self.waited / seconds, seconds / max(self.steps, 1), self.warm_up
        )
        self.start, self.waited, self.images, self.steps = now, 0.0, 0, 0
        self.warm_up = False
        return lap


def first_nonfinite(
    state: TrainState,
    criterion: nn.Module,
    batch: Batch,
    options: StepOptions,
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
    if first(None if torch.isfinite(options.inputs(batch)).all() else "the input pictures"):
        return culprit
    bad = _nonfinite_names(state.model, lambda p: p)
    if first(f"the weight {bad[0]}" if bad else None):
        return culprit
    found: list[str] = []
    hooks = []
    for name, module in state.model.named_modules():
        if next(module.children(), None) is None:
            hooks.append(module.register_forward_hook(_finite_hook(name, module, found)))
    state.optimizer.zero_grad(set_to_none=True)
    try:
        set_mode(state.model, state.model, options.train_mode)
        loss = _forward(state, criterion, batch, options, step, mixer, net=state.model)
        if not found and not torch.isfinite(loss):
            found.append("the loss, of outputs that are finite")
        if first(found[0] if found else None):
            return culprit
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    # Backward runs from the last layer to the first: the last bad one was the first to go wrong.
    bad = _nonfinite_names(state.model, lambda p: p.grad)
    state.optimizer.zero_grad(set_to_none=True)
    first(f"the gradient of {bad[-1]}" if bad else None)
    return culprit


def _nonfinite_names(model: nn.Module, part: Callable[[nn.Parameter], Tensor | None]) -> list[str]:
    """Names of the parameters of which a part of this process is not finite."""
    parts = {n: part(p) for n, p in model.named_parameters()}
    parts = {n: parallel.local(x) for n, x in parts.items() if x is not None}
    return [n for n, x in parts.items() if not torch.isfinite(x).all()]


def _finite_hook(name: str, module: nn.Module, found: list[str]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
            found.append(f"the output of {name} ({type(module).__name__})")

    return hook


@dataclass(frozen=True)
class Evaluation:
    """Exact results over a data set, of all processes together."""

    loss: float
    """Mean cross-entropy."""
    acc1: float
    """Top-1 accuracy, %."""
    acc5: float | None
    """Top-5 accuracy, %; None below five classes."""
    count: int
    """Pictures judged."""
    correct_per_class: Tensor
    """(C,) int64, right answers."""
    count_per_class: Tensor
    """(C,) int64, pictures."""


def _in_step(batches: Iterable[Batch]) -> Iterator[Batch | None]:
    """The batches, then None as long as other processes have some."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not any_process(batch is not None):
            return
        yield batch


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    options: StepOptions,
    *,
    num_classes: int,
    batch_size: int,
    shared: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Judge ``model`` on ``batches``, each process on its own share.

    Counts are integers and so are the summed losses (multiples of LOSS_UNIT), and every batch is
    filled up to the same size, for the last digit of a product of matrices depends on their shape:
    the result doesn't depend on how the pictures are shared out.

    Args:
        model: gives (B, num_classes) logits in evaluation mode.
        batches: of this process; their number may differ between processes.
        options: device, autocast and layout.
        num_classes: C.
        batch_size: pictures of a full batch.
        shared: each process has a share, which are added up; else each has the whole set.
        progress: called with the number of batches done.
    """
    model.eval()
    device = options.device
    per_class = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # right, all
    sums = torch.zeros(
        3, dtype=torch.int64, device=device
    )  # loss in units, top-5, losses not finite
    together = parallel.is_sharded(model)
    for done, batch in enumerate(_in_step(batches) if together else batches, start=1):
        if batch is None or not len(batch.targets):
            # Nothing to judge, but a sharded model needs every process for a forward pass.
            if together:
                side = options.input_size
                with options.autocast():
                    model(options.place(torch.zeros(1, 3, side, side)))
            continue
        images, targets = options.inputs(batch), options.place(batch.targets)
        filling = batch_size - len(targets)
        if filling > 0:
            images = torch.cat([images, images.new_zeros(filling, *images.shape[1:])])
        with options.autocast():
            outputs = model(images)
        outputs = outputs[: len(targets)].float()
        losses = F.cross_entropy(outputs, targets, reduction="none").double()
        finite = torch.isfinite(losses)
        sums[0] += (torch.where(finite, losses, 0.0) / LOSS_UNIT).round().long().sum()
        sums[2] += (~finite).sum()
        hits = outputs.argmax(1) == targets
        per_class[0].index_add_(0, targets, hits.long())
        per_class[1].index_add_(0, targets, torch.ones_like(targets))
        if num_classes >= 5:
            sums[1] += (outputs.topk(5).indices == targets[:, None]).sum()
        if progress:
            progress(done)
    if together:
        model.reshard()
    if shared:
        all_reduce_sum(per_class)
        all_reduce_sum(sums)
    loss_units, top5, bad = sums.tolist()
    right, count = per_class.sum(1).tolist()
    return Evaluation(
        loss=float("nan") if bad or not count else loss_units * LOSS_UNIT / count,
        acc1=100.0 * right / max(count, 1),
        acc5=100.0 * top5 / max(count, 1) if num_classes >= 5 else None,
        count=count,
        correct_per_class=per_class[0].cpu(),
        count_per_class=per_class[1].cpu(),
    )
