"""Images read at places between their pixels, by the batch and on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def middles(size: int, like: Tensor) -> Tensor:
    """Where the middles of ``size`` pixels lie, on the device of ``like``."""
    return torch.arange(size, device=like.device) + 0.5


def sampled(x: Tensor, columns: Tensor, rows: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """The levels of uint8 images (n, 3, H, W) at these places, limited and cut off.

    Args:
        x: the images.
        columns, rows: (n, H, W), pixels from the middle of the image.
        cubic: asks for the cubic kernel, otherwise it is the linear one.
        fill: (3,) uint8, the colour of what lies outside.
    """
    height, width = x.shape[2:]
    grid = torch.stack([columns * (2 / width), rows * (2 / height)], -1)  # (n, H, W, 2)
    inside = ((columns.abs() <= width / 2) & (rows.abs() <= height / 2))[:, None]
    kernel = "bicubic" if cubic else "bilinear"
    values = F.grid_sample(x.float(), grid, mode=kernel, padding_mode="border", align_corners=False)
    return torch.where(inside, values.clamp_(0, 255).to(torch.uint8), fill[:, None, None])
