"""Crops of tensors: where they lie, and how an image is brought to size.

Randomness comes in as ``Draws``, the places of the crops go out: what is drawn and what is done
with it stay apart.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from architectures.sizes import ImageSize
from augmentation.bands import rounded
from augmentation.draws import Draws, Numbers, between
from augmentation.protocol import Box, Cut, Parts
from augmentation.windows import around

ATTEMPTS = 10  # tries at a rectangle that fits, as in timm and torchvision


def random_rectangle(
    numbers: Numbers, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> Box:
    """Top, left, height and width of the random resized crop of one image (arXiv:1409.4842).

    Args:
        numbers: the first 2 × ATTEMPTS + 2 are for the crop.
        height, width: of the image, in pixels.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width of the crop over its height.
    """
    flattest, steepest = map(math.log, ratio)
    for attempt in range(ATTEMPTS):  # mostly the first one fits
        area = height * width * between(numbers[attempt], *scale)
        aspect = math.exp(between(numbers[ATTEMPTS + attempt], flattest, steepest))
        crop_h, crop_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_h <= height and 0 < crop_w <= width:
            top = int(numbers[2 * ATTEMPTS] * (height - crop_h + 1))
            left = int(numbers[2 * ATTEMPTS + 1] * (width - crop_w + 1))
            return top, left, crop_h, crop_w
    # The middle, as near to the allowed ratios as it can be.
    least, most = ratio
    crop_h = height if width / height >= least else round(width / least)
    crop_w = width if width / height <= most else round(height * most)
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def random_offset(numbers: Numbers, rows: int, columns: int) -> tuple[int, int]:
    """As :func:`random_offsets`, of one image: the first two numbers are for its crop."""
    return int(numbers[0] * (rows + 1)), int(numbers[1] * (columns + 1))


def random_offsets(draws: Draws, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Where crops begin: from 0 to ``rows`` and from 0 to ``columns``, both ends included.

    (B,) int64 each; two numbers per image are taken.
    """
    place = draws.uniform(2) * (rows + 1, columns + 1)
    top, left = place.astype(np.int64).T
    return top, left


def movable(images: Tensor) -> Tensor:
    """The same bits in a type that is moved on every device: CUDA has no indexing of uint16."""
    return images.view(torch.int16) if images.dtype == torch.uint16 else images


def take_crops(
    images: Tensor,
    indices: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    size: tuple[int, int],
) -> Tensor:
    """Crops of many images: (N, C, H, W) to (B, C, *size) on their device.

    ``indices``, ``top`` and ``left``, (B,) each: which images, and where their crops begin.
    """
    if images.device.type == "cpu":
        return _take_on_host(images, indices, top, left, size)
    device = images.device
    rows, columns = (torch.arange(side, device=device) for side in size)
    which, top_, left_ = (
        torch.from_numpy(x).to(device, non_blocking=True)[:, None, None]  # (B, 1, 1)
        for x in (indices, top, left)
    )
    # Advanced indexing puts the channels last: (B, H, W, C).
    cut = movable(images)[which, :, top_ + rows[:, None], left_ + columns]
    return cut.permute(0, 3, 1, 2).contiguous().view(images.dtype)


def _take_on_host(
    images: Tensor,
    indices: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    size: tuple[int, int],
) -> Tensor:
    # Rows of a slice are copied whole, which beats an index for every pixel.
    source = images.numpy()
    result = np.empty((len(indices), images.shape[1], *size), dtype=source.dtype)
    places = zip(indices.tolist(), top.tolist(), left.tolist(), strict=True)
    for place, (i, y, x) in enumerate(places):
        result[place] = source[i, :, y : y + size[0], x : x + size[1]]
    return torch.from_numpy(result)


def resize(cut: Cut, size: Sequence[int], interpolation: str) -> Tensor:
    """To (C, *size) of the same type, antialiased; interpolation "bilinear" or "bicubic".

    Pixels lie in memory as those of ``cut`` do: colour by colour within each, as they are decoded.
    """
    if cut.inner is not None:
        return bytes_of(resize_by_pillow(cut, size, Image.Resampling[interpolation.upper()]))
    image = cut.pixels
    if tuple(image.shape[1:]) == tuple(size):
        return image
    deep = image.dtype == torch.uint16
    values = image[None].float() if deep else _alone(image)
    values = F.interpolate(values, size=tuple(size), mode=interpolation, antialias=True)[0]
    return rounded(values) if deep else values


def _alone(image: Tensor) -> Tensor:
    """(C, H, W) as a batch of one, (1, C, H, W), in the same memory.

    ``image[None]`` has a stride by which torch takes pixels that lie colour by colour within each
    pixel for planes: it would copy them into planes, which takes two thirds of the time again.
    """
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def bytes_of(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), in the memory of one (H, W, 3) array."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_by_pillow(cut: Cut, size: Sequence[int], resample: Image.Resampling) -> Image.Image:
    """An RGB image of ``size`` (height, width), from places between pixels too."""
    image = Image.fromarray(np.ascontiguousarray(cut.pixels.permute(1, 2, 0).numpy()))
    if image.size == tuple(size[::-1]) and cut.inner is None:
        return image
    return image.resize(tuple(size[::-1]), resample, cut.inner)


def resize_around(
    image: Parts, size: tuple[int, int], interpolation: str, least: ImageSize | None = None
) -> Tensor:
    """(C, H, W) in its proportions, just large enough for ``size`` (height, width).

    ``least``: the image may be decoded at a part of its size, as of ``Parts``.
    """
    width, height = around(image.size[::-1], size[::-1])
    return resize(image.whole(least), (height, width), interpolation)
