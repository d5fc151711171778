"""Everything that changes while training, in one object that can be saved and put back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from distributed.wrapping import like
from errors import CheckpointError, printable
from optimization.ema import ModelEma
from optimization.schedule import Schedule

# State of optimisers that is as large as the parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "slow_buffer")
_OF_ADAM = ("exp_avg", "exp_avg_sq")
# The keys of an optimiser's groups that come from the configuration; the others are state.
_CONFIGURED = (
    *("weight_decay", "betas", "eps", "momentum", "lr_scale"),
    *("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable"),
)


@dataclass
class Progress:
    """Where training stands."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Batches of this process done in the epoch under way, up to the last update."""
    samples: int = 0
    """Images of the epoch under way that all processes together have seen."""
    update: int = 0
    """Optimiser steps since the beginning."""
    best: float | None = None
    """Best value of the monitored metric."""
    best_epoch: int = 0
    """Epoch of that value, counted from 1; 0 before there is one."""
    reference: float | None = None
    """Value that early stopping compares with: the last real progress."""
    improved_epoch: int = 0
    """Epoch of that progress, counted from 1."""
    loss_sum: float = 0.0
    """Sum of the batch losses of the epoch under way, over all processes."""
    loss_count: int = 0
    """Number of batch losses in that sum."""
    hits: int = 0
    """Right answers to the training images of the epoch under way, over all processes."""
    answers: int = 0
    """Number of those images."""
    recent_sum: float = 0.0
    """The part of ``loss_sum`` since the last report."""
    recent_count: int = 0
    """Number of batch losses in that part."""
    precise_until: int = 0
    """Updates before this one are made in full precision (after a rollback)."""
    updates_per_epoch: int = 0
    """Updates per epoch in the session that wrote the checkpoint."""
    world_size: int = 1
    """Number of processes in that session."""
    batch_size: int = 0
    """Batch size of one process in that session."""
    skipped: int = 0
    """Updates left out because a loss or gradient was not finite."""
    rollbacks: int = 0
    """Times training went back to a checkpoint."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Progress":
        """From what a checkpoint has of it. Raises CheckpointError for what can't be."""
        kinds = {each.name: each.type for each in fields(cls)}
        for name, value in values.items():
            kind = kinds.get(name)
            counts = kind is int and type(value) is int and 0 <= value < 2**63
            if kind is None or not (counts or kind is not int and _is_number(value, kind)):
                raise CheckpointError(f"its progress has an odd {printable(name)}")
        return cls(**values)

    def end_epoch(self) -> None:
        """Count an epoch as done."""
        self.epoch += 1
        self.step = self.samples = self.loss_count = self.recent_count = 0
        self.hits = self.answers = 0
        self.loss_sum = self.recent_sum = 0.0


@dataclass
class TrainState:
    """Model, optimiser, schedule, loss scaler, moving average and counters.

    ``model`` is the bare module, whose weights are saved; ``net`` is what is called in training:
    the same module inside DDP or torch.compile.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None
    ema: ModelEma | None
    wrap: Callable[[nn.Module], nn.Module]
    progress: Progress = field(default_factory=Progress)
    warm: bool = False
    """Whether this session has made an update; not saved."""

    def __post_init__(self) -> None:
        self.rewrap()

    def rewrap(self) -> None:
        """Make ``net`` anew: DDP fixes at its making which parameters have gradients."""
        self.net = self.wrap(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises CheckpointError if it belongs to another model or optimiser.
        """
        missing = [k for k in ("optimizer", "schedule", "progress") if k not in content]
        if missing:
            raise CheckpointError(
                f"the checkpoint holds no {', '.join(missing)}: it can't be resumed; start from "
                "its weights with --finetune"
            )
        # All that may be odd comes before the weights change.
        progress = Progress.of(content["progress"])
        average = content.get("model_ema") if self.ema else None
        for weights in (content["model"], average):
            if weights is not None:
                check_same_weights(self.model, weights)
        _check_same_optimizer(self.optimizer, content["optimizer"])
        if self.scaler and content.get("scaler"):
            _check_same_scaler(self.scaler, content["scaler"])
            self.scaler.load_state_dict(content["scaler"])
        self.schedule.load_state_dict(content["schedule"])
        configured = [{k: g[k] for k in _CONFIGURED if k in g} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(_laid_out(self.optimizer, content["optimizer"]))
            # What this session's configuration says counts, not what the checkpoint has.
            for group, values in zip(self.optimizer.param_groups, configured, strict=True):
                group |= values
        except (ValueError, KeyError) as error:
            raise _other_optimizer(str(error)) from None
        _load_weights(self.model, content["model"])
        if self.ema:
            # A run that had no average starts one from its weights.
            _load_weights(self.ema.module, content["model"] if average is None else average)
        self.progress = progress


def _load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({k: like(v, own[k]) for k, v in weights.items()})


def _other_optimizer(why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint was written with another optimiser or parameter groups ({why}); "
        "resume with the same --opt, --layer-decay and --head-lr-scale, or use --finetune"
    )


def _check_same_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """CheckpointError if the saved state can't be that of the optimiser: torch itself takes any
    values, and the next update fails."""
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        return  # which torch says
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if "lr" not in group:
            raise _other_optimizer("a parameter group has no lr")
        for name, value in group.items():
            if name not in own or name == "params":
                continue
            by_default = value is None and name in ("foreach", "fused")
            if not by_default and not _is_like(value, own[name]):
                raise _other_optimizer(f"its {printable(name)} is a {type(value).__name__}")
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for i, values in saved["state"].items():
        if type(i) is not int or not 0 <= i < len(shapes) or not isinstance(values, Mapping):
            raise _other_optimizer(f"it has state of a parameter {printable(str(i))}")
        whole = "step" in values and all(isinstance(values.get(x), Tensor) for x in _OF_ADAM)
        if isinstance(optimizer, torch.optim.Adam) and not whole:
            raise _other_optimizer(f"its state of parameter {i} is incomplete")
        for name, value in values.items():
            if name in _MOMENTS and isinstance(value, Tensor):
                # A few optimisers have one number for all values of a parameter.
                fits = value.shape in (shapes[i], ()) and value.is_floating_point()
            elif name == "step":
                fits = _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)
            else:
                fits = value is None or name not in _MOMENTS
            if not fits:
                raise _other_optimizer(f"its {name} of parameter {i} is odd")


def _check_same_scaler(scaler: torch.amp.GradScaler, saved: Mapping[str, Any]) -> None:
    """CheckpointError if the saved state can't be that of the loss scaler."""
    own = scaler.state_dict()
    for name in own:
        value = saved.get(name)
        # The scaler keeps them as float32 and int32.
        most = 2**31 - 1 if isinstance(own[name], int) else torch.finfo(torch.float32).max
        if type(value) is not type(own[name]) or not 0 <= value <= most:
            raise CheckpointError(f"its scaler has an odd {name}")


def _is_like(value: Any, own: Any) -> bool:
    """Whether a value may stand in the place of another one: both numbers, or of one type."""
    numbers = [_is_number(x) or (isinstance(x, Tensor) and x.numel() == 1) for x in (value, own)]
    if own is None:
        return value is None or isinstance(value, bool) or numbers[0]
    return all(numbers) or type(value) is type(own)


def _is_number(value: Any, kind: Any = float) -> bool:
    """Whether ``value`` is a number, or None where ``kind`` allows it."""
    if value is None:
        return kind == float | None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _laid_out(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's saved ``state`` with each tensor spread as the parameter it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    laid_out = {
        i: {k: like(v, parameters[i]) for k, v in values.items()}
        for i, values in state["state"].items()
        if i < len(parameters)
    }
    return {**state, "state": laid_out}


def check_same_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """CheckpointError that says what differs, unless ``weights`` may be those of ``model``."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    saved = {k: tuple(v.shape) for k, v in weights.items()}
    differing = [k for k in own if k in saved and own[k] != saved[k]]
    missing, surplus = [k for k in own if k not in saved], [k for k in saved if k not in own]
    if differing or missing or surplus:
        details = [f"{k} is {saved[k]} there and {own[k]} here" for k in differing[:3]]
        details += [f"{k} is missing there" for k in missing[:2]]
        details += [f"{k} is unknown here" for k in surplus[:2]]
        count = len(differing) + len(missing) + len(surplus)
        raise CheckpointError(
            "the checkpoint belongs to another model or class count: "
            f"{'; '.join(details)}{'; …' if count > len(details) else ''}. Resume with the same "
            "--model, --input-size and data set, or use --finetune to take over what fits"
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not weights[name].is_floating_point():
            raise CheckpointError(f"its {name} is {weights[name].dtype}, not {value.dtype}")


def is_better(value: float, best: float | None, *, lower: bool, delta: float = 0.0) -> bool:
    """Whether ``value`` improves on ``best`` by more than ``delta``; NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - delta if lower else value > best + delta
