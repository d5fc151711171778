"""Channels-last: whether a model's weights and images lie so in memory, and putting them there."""

import torch
from torch import nn


def wants_channels_last(model: nn.Module, asked: bool | None) -> bool:
    """Whether images and weights go channels-last: as ``asked``, None: if it is a CNN.

    Its convolutions look beyond one pixel several times; a transformer's do in the stem alone.
    """
    if asked is not None:
        return asked
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return len(spatial) > 4


def to_channels_last(model: nn.Module) -> nn.Module:
    """``model`` with its weights and buffers of four dimensions channels-last, in place.

    ``Module.to(memory_format=…)`` takes those of five dimensions for images as well and fails on
    them; a LambdaNet's positions are such weights. They stay as they are.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model
