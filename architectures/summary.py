"""Parameters and multiply-accumulates of a model."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from architectures.factory import first_line
from errors import OptionError


@dataclass(frozen=True)
class ModelSummary:
    """The size of a model."""

    parameters: int
    """Number of values, trained or not."""
    macs: int
    """Multiply-accumulates of one image."""


def summarise(model: nn.Module, input_size: int) -> ModelSummary:
    """Count parameters, and the multiply-accumulates of one image of ``input_size`` pixels.

    Counting runs on shapes alone where the model allows it. Raises OptionError if the model doesn't
    take images of that size.
    """
    try:
        macs = _count_macs(model, input_size, torch.device("meta"))
    except Exception:  # of any kind: the size is wrong, or the model can't do without real values
        try:
            macs = _count_macs(model, input_size, next(model.parameters()).device)
        except Exception as error:
            name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
            raise OptionError(
                "input_size", f"{input_size} doesn't fit {name}: {first_line(error)}"
            ) from error
    return ModelSummary(sum(p.numel() for p in model.parameters()), macs)


def _count_macs(model: nn.Module, input_size: int, device: torch.device) -> int:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    tensors = {name: x.detach().to(device) for name, x in tensors.items()}
    image = torch.zeros(1, 3, input_size, input_size, device=device)
    was_training = model.training
    model.eval()
    try:
        # Of the kinds of fused attention only the plain one is counted everywhere.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, tensors, (image,))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2
