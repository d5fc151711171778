"""Parameters and multiply-accumulates of a model."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.mvitv2 import MultiScaleVit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from architectures.sizes import ImageSize, height_width, size_text
from errors import OptionError, first_line


@dataclass(frozen=True)
class ModelSummary:
    """The size of a model."""

    parameters: int
    """Number of values, trained or not."""
    macs: int
    """Multiply-accumulates of one image."""


def summarise(
    model: nn.Module,
    input_size: ImageSize,
    num_classes: int | None = None,
    *,
    in_chans: int = 3,
) -> ModelSummary:
    """Count parameters, and the multiply-accumulates of one image of ``input_size`` pixels and
    ``in_chans`` channels.

    Counting runs on shapes alone where the model allows it and they tell whether the size fits.
    Raises OptionError if the model doesn't take images of that size, or needs more than images, or
    (with ``num_classes``) answers with other things than a logit for each class: an encoder of
    timm's gives features.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    shape = in_chans, *height_width(input_size)
    # MViT V2 looks up its positions, and an index out of their range shows with values alone.
    real = next(model.parameters()).device
    device = real if isinstance(model, MultiScaleVit) else torch.device("meta")
    try:
        macs, answer = _count_macs(model, shape, device)
    except Exception:  # of any kind: the size is wrong, or the model can't do without real values
        try:
            macs, answer = _count_macs(model, shape, real)
        except Exception as error:
            _check_arguments(model, name)
            raise OptionError(
                "input_size",
                f"{size_text(input_size)} doesn't fit {name}: {_reason(error)}",
            ) from error
    if num_classes is not None:
        _check_answer(answer, name, num_classes)
    return ModelSummary(sum(p.numel() for p in model.parameters()), macs)


def _reason(error: Exception) -> str:
    """In one line; torch's own of maps without a place left says nothing of images."""
    text = first_line(error)
    small = re.search(r"greater than (actual input size|0)|output size is too small", text, re.I)
    return "the image is smaller than its layers take" if small else text


def _check_arguments(model: nn.Module, name: str) -> None:
    """Raise OptionError if ``model`` can't be called with images alone."""
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError as error:
        raise OptionError(
            "model", f"{name} needs more than images ({error}): name a model that classifies images"
        ) from error


def _check_answer(answer: Any, name: str, num_classes: int) -> None:
    """Raise OptionError unless ``answer``, of one image, is (1, num_classes)."""
    if isinstance(answer, Tensor) and answer.shape == (1, num_classes):
        return
    form = tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    raise OptionError(
        "model",
        f"{name} answers an image with {form}, not with (1, {num_classes}), a logit for each "
        "class: name a model that classifies images",
    )


def _count_macs(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> tuple[int, Any]:
    """Multiply-accumulates of one image of ``shape`` (C, H, W), and what the model answers."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    tensors = {name: x.detach().to(device) for name, x in tensors.items()}
    image = torch.zeros(1, *shape, device=device)
    was_training = model.training
    model.eval()
    try:
        # Of the kinds of fused attention only the plain one is counted everywhere.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            answer = torch.func.functional_call(model, tensors, (image,))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2, answer
