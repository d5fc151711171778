"""Images read at places between their pixels, by the batch and on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def middles(size: int, like: Tensor) -> Tensor:
    """Where the middles of ``size`` pixels lie, on the device of ``like``."""
    return torch.arange(size, device=like.device) + 0.5


def sampled(x: Tensor, columns: Tensor, rows: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """The levels of images (n, C, H, W) at these places, limited to those that there are.

    Args:
        x: the images, uint8, of which levels are cut off, or float32 of 16 bits.
        columns, rows: (n, H, W), pixels from the middle of the image.
        cubic: asks for the cubic kernel, otherwise it is the linear one.
        fill: (C,) of the same kind, the colour of what lies outside.
    """
    height, width = x.shape[2:]
    grid = torch.stack([columns * (2 / width), rows * (2 / height)], -1)  # (n, H, W, 2)
    inside = ((columns.abs() <= width / 2) & (rows.abs() <= height / 2))[:, None]
    kernel = "bicubic" if cubic else "bilinear"
    values = F.grid_sample(x.float(), grid, mode=kernel, padding_mode="border", align_corners=False)
    return torch.where(inside, limited(values, x.dtype), fill[:, None, None])


def limited(values: Tensor, kind: torch.dtype) -> Tensor:
    """Floats, in place, as levels: uint8, cut off, or float32 of 16 bits."""
    if kind == torch.uint8:
        return values.clamp_(0, 255).to(kind)
    return values.clamp_(0, 65535)
