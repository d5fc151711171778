"""The optimiser, from timm's registry."""

import inspect
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from config import OptimOptions, keywords, optimizer_name
from distributed.wrapping import is_sharded
from errors import OptionError, did_you_mean, first_names
from optimization.groups import parameter_groups

log = logging.getLogger(__name__)

# The optimisers of torch whose fused kernels look at ``found_inf`` (torch/optim/{adam,sgd}.py).
_FLAGGED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
_FUSED_DEVICES = {"cpu", "cuda"}
_REFERENCE_BATCH = 512


def scaled_lr(lr: float, effective_batch: int, unscale: bool = False) -> float:
    """The learning rate for ``effective_batch`` images per update, lr × batch / 512 (DeiT).

    ``unscale`` leaves it as it is.
    """
    return lr if unscale else lr * effective_batch / _REFERENCE_BATCH


def build_optimizer(
    model: nn.Module, options: OptimOptions, *, lr: float, required: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimiser over all parameters of ``model``, fused where torch has that.

    Build it with the model on its device and before anything is frozen.

    Args:
        model: its parameters are grouped by :func:`parameter_groups`.
        options: ``opt`` is a name of timm's registry, ``lookahead_NAME`` wraps another. The names
            of apex's fused kernels stand for the optimisers of the same update.
        lr: learning rate, scaled already.
        required: options that were asked for. Where the optimiser takes no such argument, these
            raise; others are left out.

    Raises:
        OptionError: an unknown or unusable optimiser, or an argument that it doesn't take.
    """
    from timm.optim import create_optimizer_v2

    name = optimizer_name(options.opt)
    if name != options.opt.lower():
        log.warning("--opt %s: %s is used, the same update without apex", options.opt, name)
    info, optimizer_class = registered(name)
    arguments = _arguments(name, info, options, required)
    arguments |= _further(name, optimizer_class, options)
    devices = {p.device.type for p in model.parameters()}
    # Fused SGD has no form for sharded tensors.
    fits = not (is_sharded(model) and optimizer_class is torch.optim.SGD)
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


def registered(opt: str) -> tuple[Any, type]:
    """timm's entry for the optimiser of ``--opt``, and its class.

    Raises OptionError for an unknown or unusable one.
    """
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    name = optimizer_name(opt)
    base = name.removeprefix("lookahead_")
    if base not in list_optimizers():
        examples = "for example adamw, sgd, lamb, lion"
        hint = did_you_mean(base, list_optimizers(), most=3, otherwise=examples)
        raise OptionError("opt", f"unknown optimiser {name!r}; {hint}")
    info = get_optimizer_info(base)
    if info.second_order:
        raise OptionError(
            "opt", f"{base} needs second derivatives, which training doesn't compute: use adamw"
        )
    try:
        return info, get_optimizer_class(base, bind_defaults=False)
    except (AssertionError, ImportError) as error:
        plain = base.removeprefix("fused").removeprefix("bnb").removesuffix("8bit")
        instead = f"; {plain} needs no further package" if plain in list_optimizers() else ""
        raise OptionError("opt", f"{base} can't be used here: {error}{instead}") from None


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


def _further(name: str, optimizer_class: type, options: OptimOptions) -> dict[str, Any]:
    """The arguments of ``--opt-kwargs``. Raises OptionError for one that it doesn't take."""
    given = keywords("opt_kwargs", options.opt_kwargs)
    known = [n for n in inspect.signature(optimizer_class.__init__).parameters if n != "self"]
    for argument in given:
        if argument not in known:
            hint = did_you_mean(argument, known, otherwise=f"it takes {first_names(known, 8)}")
            raise OptionError("opt_kwargs", f"--opt {name} takes no {argument!r}: {hint}")
    return given


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin the momentum of fused SGD at zero, which is what its first step does too.

    Otherwise a first step that ``found_inf`` leaves out keeps uninitialised memory as momentum, and
    a parameter unfrozen later has none.
    """
    # Lookahead keeps all state in the optimiser that it wraps.
    state = getattr(optimizer, "_base_optimizer", optimizer).state
    for group in optimizer.param_groups:
        if group["momentum"] != 0:
            for parameter in group["params"]:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def optimizer_supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` leaves all as it is when ``optimizer.found_inf`` holds a 1 on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in _FLAGGED and fused
