"""Crops of uint8 tensors: where they lie, and how an image is brought to size.

Randomness comes in as ``Draws``, the places of the crops go out: what is drawn and what is done
with it stay apart.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from augmentation.draws import Draws, between

ATTEMPTS = 10  # tries at a rectangle that fits, as in timm and torchvision


def random_rectangle(
    draws: Draws, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of the random resized crop of one image (arXiv:1409.4842).

    Args:
        draws: of a batch of one; 2 × ATTEMPTS + 2 numbers are taken.
        height, width: of the image, in pixels.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width of the crop over its height.
    """
    area = height * width * between(draws.uniform(ATTEMPTS)[0], *scale)
    aspect = np.exp(between(draws.uniform(ATTEMPTS)[0], *np.log(ratio)))
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = np.flatnonzero((widths <= width) & (heights <= height) & (widths > 0) & (heights > 0))
    place = draws.uniform(2)[0]
    if len(fits):
        crop_h, crop_w = int(heights[fits[0]]), int(widths[fits[0]])
        top, left = int(place[0] * (height - crop_h + 1)), int(place[1] * (width - crop_w + 1))
        return top, left, crop_h, crop_w
    # The middle, as near to the allowed ratios as it can be.
    least, most = ratio
    crop_h = height if width / height >= least else round(width / least)
    crop_w = width if width / height <= most else round(height * most)
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def random_offsets(draws: Draws, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Where crops begin: from 0 to ``rows`` and from 0 to ``columns``, both ends included.

    (B,) int64 each; two numbers per image are taken.
    """
    place = draws.uniform(2) * (rows + 1, columns + 1)
    top, left = place.astype(np.int64).T
    return top, left


def take_crops(
    images: Tensor, indices: np.ndarray, top: np.ndarray, left: np.ndarray, size: int
) -> Tensor:
    """Square crops of many images: uint8 (N, 3, H, W) to (B, 3, size, size) on their device.

    ``indices``, ``top`` and ``left``, (B,) each: which images, and where their crops begin.
    """
    if images.device.type == "cpu":
        return _take_on_host(images, indices, top, left, size)
    device, side = images.device, torch.arange(size, device=images.device)
    which, top_, left_ = (
        torch.from_numpy(x).to(device, non_blocking=True)[:, None, None]  # (B, 1, 1)
        for x in (indices, top, left)
    )
    # Advanced indexing puts the channels last: (B, S, S, 3).
    cut = images[which, :, top_ + side[:, None], left_ + side]
    return cut.permute(0, 3, 1, 2).contiguous()


def _take_on_host(
    images: Tensor, indices: np.ndarray, top: np.ndarray, left: np.ndarray, size: int
) -> Tensor:
    # Rows of a slice are copied whole, which beats an index for every pixel.
    source = images.numpy()
    result = np.empty((len(indices), 3, size, size), dtype=np.uint8)
    places = zip(indices.tolist(), top.tolist(), left.tolist(), strict=True)
    for place, (i, y, x) in enumerate(places):
        result[place] = source[i, :, y : y + size, x : x + size]
    return torch.from_numpy(result)


def resize(image: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """uint8 (3, H, W) to (3, *size), antialiased; interpolation "bilinear" or "bicubic"."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=tuple(size), mode=interpolation, antialias=True)[0]


def resize_short_side(image: Tensor, size: int, interpolation: str) -> Tensor:
    """uint8 (3, H, W) with a short side of ``size`` pixels; the long one as torchvision's."""
    height, width = image.shape[1:]
    long = int(size * max(height, width) / min(height, width))
    return resize(image, (size, long) if height <= width else (long, size), interpolation)
