"""Parameter groups, optimisers, the learning-rate schedule, freezing and gradient clipping."""

import difflib
import logging
import math
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import parallel
from config import OptimOptions, ScheduleOptions
from errors import OptionError

log = logging.getLogger(__name__)

# The optimisers of torch whose fused kernels look at ``found_inf`` (torch/optim/{adam,sgd}.py).
_FLAGGED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
_FUSED_DEVICES = {"cpu", "cuda"}
_REFERENCE_BATCH = 512


def scaled_lr(lr: float, effective_batch: int, unscale: bool = False) -> float:
    """The learning rate for ``effective_batch`` pictures an update, lr × batch / 512 (DeiT).

    ``unscale`` leaves it as it is.
    """
    return lr if unscale else lr * effective_batch / _REFERENCE_BATCH


# --- parameter groups -----------------------------------------------------------------------------


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the classifier head, of both heads of a distilled model."""
    if not hasattr(model, "get_classifier"):
        return []
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """All parameters of ``model``, fixed ones included, by learning-rate factor and weight decay.

    Biases, other vectors (norms, layer scales) and what ``model.no_weight_decay()`` names don't
    decay. With ``layer_decay`` the parameters k layers below the head learn at ``layer_decay ** k``
    times the rate (BEiT, Bao et al. 2021), by the layers of ``model.group_matcher``;
    ``head_lr_scale`` multiplies the classifier's rate.

    Returns:
        Groups with the keys params, weight_decay and lr_scale.

    Raises:
        OptionError: the model has no layers to tell apart, or no classifier.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if layer_decay is not None:
        scales = _layer_scales(model, layer_decay)
    head: set[int] = set()
    if head_lr_scale != 1.0:
        head = {id(p) for p in classifier_parameters(model)}
        if not head:
            raise OptionError(
                "head_lr_scale", "the model has no classifier of its own: leave it out"
            )
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = scales[name] * (head_lr_scale if id(parameter) in head else 1.0)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or _matches(name, exempt)
        decay = 0.0 if plain else weight_decay
        group = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning-rate factor of each parameter; 1 for the topmost layer."""
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise OptionError(
            "layer_decay",
            f"{type(model).__name__} doesn't say which parameters make a layer: leave it out",
        )
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    top = max(layers.values())
    return {
        name: layer_decay ** (top - layers.get(name, top)) for name, _ in model.named_parameters()
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter is named by a pattern: a glob, its name, or the module that holds it."""
    return any(fnmatchcase(name, p) or name.startswith(p.rstrip(".") + ".") for p in patterns)


# --- optimiser ------------------------------------------------------------------------------------


def build_optimizer(
    model: nn.Module, options: OptimOptions, *, lr: float, required: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimiser over all parameters of ``model``, fused where torch has that.

    Build it with the model on its device and before anything is frozen.

    Args:
        model: its parameters are grouped by :func:`parameter_groups`.
        options: ``opt`` is a name of timm's registry, ``lookahead_NAME`` wraps another.
        lr: learning rate, scaled already.
        required: options that were asked for. Where the optimiser takes no such argument, these
            raise; others are left out.

    Raises:
        OptionError: an unknown or unusable optimiser, or an argument that it doesn't take.
    """
    from timm.optim import create_optimizer_v2

    name = options.opt.lower()
    info, optimizer_class = _registered(name)
    arguments = _arguments(name, info, options, required)
    devices = {p.device.type for p in model.parameters()}
    # Fused SGD has no form for sharded tensors.
    fits = not (parallel.is_sharded(model) and optimizer_class is torch.optim.SGD)
    if optimizer_class in _FLAGGED and devices <= _FUSED_DEVICES and fits:
        arguments["fused"] = True
    groups = parameter_groups(
        model,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        head_lr_scale=options.head_lr_scale,
    )
    try:
        optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **arguments)
    except (ValueError, TypeError) as error:
        raise OptionError("opt", f"{options.opt} refuses its options: {error}") from None
    if optimizer_class is torch.optim.SGD and arguments.get("fused"):
        _start_momentum(optimizer)
    return optimizer


def _registered(name: str) -> tuple[Any, type]:
    """timm's entry for an optimiser, and its class."""
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    base = name.removeprefix("lookahead_")
    if base not in list_optimizers():
        close = difflib.get_close_matches(base, list_optimizers(), n=3)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else "for example adamw, sgd, lamb, lion"
        )
        raise OptionError("opt", f"unknown optimiser {name!r}; {hint}")
    info = get_optimizer_info(base)
    if info.second_order:
        raise OptionError("opt", f"{base} needs second derivatives, which training doesn't compute")
    try:
        return info, get_optimizer_class(base, bind_defaults=False)
    except (AssertionError, ImportError) as error:
        raise OptionError("opt", f"{base} can't be used here: {error}") from None


def _arguments(
    name: str, info: Any, options: OptimOptions, required: Collection[str]
) -> dict[str, Any]:
    """The options of the optimiser that it takes."""
    wanted = (
        ("opt_eps", "eps", options.opt_eps, info.has_eps),
        ("opt_betas", "betas", options.opt_betas, info.has_betas),
        ("momentum", "momentum", options.momentum, info.has_momentum),
    )
    arguments = {}
    for option, argument, value, taken in wanted:
        if value is None:
            continue
        if taken:
            arguments[argument] = value
        elif option in required:
            raise OptionError(option, f"--opt {name} takes none: leave it out")
    betas = arguments.get("betas")
    if betas is not None and len(betas) != info.num_betas:
        raise OptionError(
            "opt_betas", f"--opt {name} takes {info.num_betas} values, got {len(betas)}"
        )
    return arguments


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin the momentum of fused SGD at zero, which is what its first step does too.

    Otherwise a first step that ``found_inf`` leaves out keeps uninitialised memory as momentum, and
    a parameter unfrozen later has none.
    """
    for group in optimizer.param_groups:
        if group["momentum"] != 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def optimizer_supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` leaves all as it is when ``optimizer.found_inf`` holds a 1 on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in _FLAGGED and fused


# --- schedule -------------------------------------------------------------------------------------


class Schedule:
    """The learning rate as a function of the update's number t, counted from 0.

    The rate starts at ``warmup_lr``, rises in a straight line to ``lr`` over ``warmup_epochs``,
    goes on as ``sched`` says until ``epochs`` are over, and stays at its end during the cool-down.
    The warm-up is part of the schedule's length, as in DeiT. A cosine therefore goes on, after the
    warm-up, from where it would be without one.

    Only plateau has a state; all others give the same rate for t whatever was asked before.

    Attributes:
        factor: multiplies the rate; halved when training is rolled back. Part of the state.
        last: rate that :meth:`apply` set last, of groups whose lr_scale is 1.

    Args:
        options: kind and shape.
        lr: peak rate.
        epochs: length without the cool-down.
        updates_per_epoch: optimiser steps of an epoch.
        lower_is_better: of plateau's metric.
        seed: of the noise.
        required: options that were asked for. A ``warmup_lr`` or ``min_lr`` above ``lr`` raises if
            it is one of them, else it is replaced by 0 with a note in the log.
    """

    def __init__(
        self,
        options: ScheduleOptions,
        *,
        lr: float,
        epochs: int,
        updates_per_epoch: int,
        lower_is_better: bool = False,
        seed: int = 0,
        required: Collection[str] = (),
    ) -> None:
        self.options = options
        self.lr = lr
        self.total = epochs * updates_per_epoch
        self.warmup = round(options.warmup_epochs * updates_per_epoch)
        self.warmup_lr = _floor(options, "warmup_lr", lr, required)
        self.min_lr = _floor(options, "min_lr", lr, required)
        self.factor = 1.0
        self.last = 0.0
        # Schedulers write the rate into an optimiser: this one has no other purpose.
        self._slot = torch.optim.SGD([torch.zeros(1)], lr=lr)
        self._timm: Any = None
        self._plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        if options.sched == "plateau":
            self._plateau = self._build_plateau(lower_is_better)
        elif options.sched != "onecycle":
            self._timm = self._build_timm(updates_per_epoch, seed)

    def rate(self, t: int) -> float:
        """Learning rate of update ``t``, before ``factor`` and ``lr_scale``."""
        if t >= self.total and self.options.sched in ("cosine", "cosine-restarts", "poly"):
            return self.min_lr
        if self.options.sched == "onecycle":
            return self._onecycle(t)
        if self._timm is not None:
            self._timm.step_update(min(t, self.total - 1))
        rate = self._slot.param_groups[0]["lr"]
        if self._plateau is not None and t < self.warmup:
            return self.warmup_lr + t * (rate - self.warmup_lr) / self.warmup
        return rate

    def apply(self, optimizer: torch.optim.Optimizer, t: int) -> None:
        """Set the learning rates of ``optimizer`` for update ``t``."""
        self.last = self.rate(t) * self.factor
        for group in optimizer.param_groups:
            group["lr"] = self.last * group.get("lr_scale", 1.0)

    def end_epoch(self, metric: float | None) -> None:
        """Tell plateau the epoch's metric; None where nothing was measured."""
        if self._plateau is not None and metric is not None:
            self._plateau.step(metric)

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        state: dict[str, Any] = {"factor": self.factor, "last": self.last}
        if self._plateau is not None:
            state["plateau"] = {
                "lr": self._slot.param_groups[0]["lr"],
                "best": float(self._plateau.best),
                "num_bad_epochs": self._plateau.num_bad_epochs,
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned; the options may have changed since."""
        self.factor, self.last = state["factor"], state["last"]
        if self._plateau is not None and "plateau" in state:
            saved = state["plateau"]
            self._slot.param_groups[0]["lr"] = saved["lr"]
            self._plateau.best = saved["best"]
            self._plateau.num_bad_epochs = saved["num_bad_epochs"]

    def _onecycle(self, t: int) -> float:
        """One cycle (Smith 2018), as torch's OneCycleLR with cosines: up, then down."""
        peak, end = self.warmup - 1, self.total - 1
        if t <= peak:
            return _cosine(self.warmup_lr, self.lr, t / peak if peak else 1.0)
        start = max(peak, 0)
        return _cosine(self.lr, self.min_lr, (min(t, end) - start) / max(end - start, 1))

    def _build_plateau(self, lower: bool) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        if self.options.decay_rate >= 1:
            raise OptionError("decay_rate", "--sched plateau needs one below 1")
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._slot,
            mode="min" if lower else "max",
            factor=self.options.decay_rate,
            patience=self.options.patience_epochs,
            min_lr=self.min_lr,
        )

    def _build_timm(self, updates_per_epoch: int, seed: int) -> Any:
        from timm import scheduler

        o = self.options
        shared: dict[str, Any] = {
            "warmup_t": self.warmup,
            "warmup_lr_init": self.warmup_lr,
            "warmup_prefix": False,
            "t_in_epochs": False,
        }
        if o.lr_noise is not None:
            start, stop = (*o.lr_noise, 1.0)[:2]
            shared |= {
                "noise_range_t": (start * self.total, stop * self.total),
                "noise_pct": o.lr_noise_pct,
                "noise_std": o.lr_noise_std,
                "noise_seed": seed,
            }

        def updates(epochs: float) -> int:
            return max(1, round(epochs * updates_per_epoch))

        if o.sched == "cosine":
            return scheduler.CosineLRScheduler(
                self._slot, t_initial=self.total, lr_min=self.min_lr, **shared
            )
        if o.sched == "cosine-restarts":
            first = (
                self.total / 4 / updates_per_epoch if o.restart_epochs is None else o.restart_epochs
            )
            return scheduler.CosineLRScheduler(
                self._slot,
                t_initial=updates(first),
                lr_min=self.min_lr,
                cycle_mul=o.restart_mul,
                cycle_decay=o.restart_decay,
                cycle_limit=self.total,
                **shared,
            )
        if o.sched == "poly":
            return scheduler.PolyLRScheduler(
                self._slot, t_initial=self.total, power=o.poly_power, lr_min=self.min_lr, **shared
            )
        if o.sched == "multistep":
            # timm decays one update before the milestone it is given.
            milestones = sorted(updates(epoch) + 1 for epoch in o.decay_milestones)
            return scheduler.MultiStepLRScheduler(
                self._slot, decay_t=milestones, decay_rate=o.decay_rate, **shared
            )
        rate = 1.0 if o.sched == "constant" else o.decay_rate
        return scheduler.StepLRScheduler(
            self._slot, decay_t=updates(o.decay_epochs), decay_rate=rate, **shared
        )


def _floor(options: ScheduleOptions, name: str, lr: float, required: Collection[str]) -> float:
    """``warmup_lr`` or ``min_lr``, which must not lie above the peak rate."""
    value = getattr(options, name)
    if value <= lr:
        return value
    if name in required:
        raise OptionError(name, f"{value:g} is above the learning rate {lr:g}: lower it")
    log.info("--%s %g is above the learning rate %g: 0 is used", name.replace("_", "-"), value, lr)
    return 0.0


def _cosine(start: float, end: float, share: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


# --- freezing -------------------------------------------------------------------------------------


class Freezer:
    """Which parameters are trained in which epoch.

    A pattern is a glob on parameter names or the name of a module: ``blocks.3``, ``head``,
    ``*.norm1.*``. ``attn_only`` trains attention, the classifier and the position embedding
    (Touvron et al., "Three things everyone should know about Vision Transformers", 2022, §4).

    Args:
        model: the bare module. What it keeps fixed itself stays fixed.
        freeze: patterns of what is kept fixed.
        unfreeze_at: ``EPOCH:PATTERN``, what is trained from that epoch on.
        attn_only: in place of ``freeze``.

    Raises:
        OptionError: a pattern that matches nothing, a model without attention, or nothing left to
            train.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: Sequence[str] = (),
        unfreeze_at: Sequence[str] = (),
        attn_only: bool = False,
    ) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names = list(self._parameters)
        frozen: set[str] = set()
        if attn_only:
            frozen = set(names) - _attention_names(model, names)
        for pattern in freeze:
            frozen |= _matching(pattern, names, "freeze", "parameter")
        # The epoch from which a parameter is trained; infinity for those that stay fixed.
        self._from = {name: math.inf if name in frozen else 0.0 for name in names}
        for rule in unfreeze_at:
            epoch, _, pattern = rule.partition(":")
            for name in _matching(pattern, sorted(frozen), "unfreeze_at", "frozen parameter"):
                self._from[name] = min(self._from[name], int(epoch))
        if all(epoch > 0 for epoch in self._from.values()):
            raise OptionError(
                "freeze", "leaves nothing to train in the first epoch: free some part"
            )

    def apply(self, epoch: int) -> bool:
        """Set ``requires_grad`` as ``epoch`` (counted from 0) has it; returns whether any changed.

        Depends on the epoch only. Gradients of what becomes fixed are dropped.
        """
        changed = False
        for name, parameter in self._parameters.items():
            trained = epoch >= self._from[name]
            changed |= parameter.requires_grad != trained
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
        return changed


def _attention_names(model: nn.Module, names: Sequence[str]) -> set[str]:
    attention = {name for name in names if ".attn." in name}
    if not attention:
        raise OptionError("attn_only", "the model has no attention: leave it out or use --freeze")
    head = {id(p) for p in classifier_parameters(model)}
    rest = {n for n, p in model.named_parameters() if id(p) in head or n == "pos_embed"}
    return attention | rest & set(names)


def _matching(pattern: str, names: Sequence[str], option: str, kind: str) -> set[str]:
    """The names that ``pattern`` stands for, at least one."""
    found = {name for name in names if _matches(name, [pattern])}
    if not found:
        modules = list(dict.fromkeys(n.rpartition(".")[0] or n for n in names))
        close = difflib.get_close_matches(pattern, [*names, *modules], n=3, cutoff=0.5)
        examples = ", ".join(close or modules[:3]) or "none"
        raise OptionError(option, f"{pattern!r} matches no {kind}; there is {examples}")
    return found


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Norms with running statistics all of whose parameters are fixed.

    In training they belong in evaluation mode: else their statistics go on moving.
    """
    found = []
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        fixed = parameters and not any(p.requires_grad for p in parameters)
        if getattr(module, "running_mean", None) is not None and fixed:
            found.append(module)
    return found


# --- gradients ------------------------------------------------------------------------------------


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    clip_grad: float | None,
    mode: str = "norm",
    *,
    spared: Collection[nn.Parameter] = (),
) -> Tensor:
    """Limit the gradients in place, without waiting for the device.

    Args:
        parameters: those without a gradient are passed over.
        clip_grad: the limit; None leaves the gradients alone.
        mode: norm (of all gradients together), value (each element), or agc (adaptive gradient
            clipping, each unit against its weight: Brock et al. 2021, eq. 3).
        spared: parameters that agc leaves alone; the paper spares the classifier.

    Returns:
        Norm of all gradients before clipping, a scalar on their device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if not parameters:
        return torch.zeros(())
    if clip_grad is not None and mode == "norm":
        return parallel.whole(nn.utils.clip_grad_norm_(parameters, clip_grad))
    norm = parallel.whole(nn.utils.get_total_norm([p.grad for p in parameters]))
    if clip_grad is not None and mode == "value":
        for parameter in parameters:
            parallel.local(parameter.grad).clamp_(-clip_grad, clip_grad)
    elif clip_grad is not None:
        from timm.utils.agc import adaptive_clip_grad

        left_out = {id(p) for p in spared}
        adaptive_clip_grad([p for p in parameters if id(p) not in left_out], clip_grad)
    return norm
