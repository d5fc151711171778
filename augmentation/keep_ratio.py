"""Training crops that keep the proportions: timm's ``--train-crop-mode`` rkrc and rkrr.

An image is resized just around the input, in half of the cases larger by a random share of the area
and in half of the cases stretched by a random ratio. The input is then cut out in the middle (rkrc)
or at a random place (rkrr); where a stretched image is too small it is mirrored.
"""

import math
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomCropOrPad, ResizeKeepRatio
from torch import Tensor

from architectures.sizes import ImageSize
from augmentation.crops import bytes_of, resize, resize_by_pillow
from augmentation.draws import Numbers, between
from augmentation.protocol import Parts
from augmentation.windows import centre, is_made_whole, window

if TYPE_CHECKING:
    from config import AugmentOptions

PROBABILITY = 0.5  # of another area, and of another ratio
Size = tuple[int, int]


class KeepRatioCrop:
    """One image at a time: timm's draws, from the host's generators, and its pixels.

    ``least``: large JPEG files may be decoded at a part of their size; None: they may not.
    """

    def __init__(self, size: Size, options: "AugmentOptions", least: ImageSize | None) -> None:
        self.size, self.least = size, least
        self.scale, self.ratio = options.scale, options.ratio
        self.centred = options.train_crop_mode == "rkrc"
        name = options.train_interpolation
        names = ("bilinear", "bicubic") if name == "random" else (name,)
        self.filters = [Image.Resampling[name.upper()] for name in names]

    def __call__(self, image: Image.Image | Parts) -> Image.Image:
        parts = image if isinstance(image, Parts) else None
        # timm asks for nothing but the size.
        sized = torch.empty(3, *(parts.size if parts else image.size[::-1]), device="meta")
        resized = ResizeKeepRatio.get_params(
            sized, self.size, 0.0, PROBABILITY, self.scale, True, PROBABILITY, self.ratio
        )
        resample = random.choice(self.filters) if len(self.filters) > 1 else self.filters[0]
        if self.centred:
            top, left = map(centre, resized, self.size)
        else:
            top, left = RandomCropOrPad.get_params(
                torch.empty(3, *resized, device="meta"), self.size
            )
        if parts:
            cut = parts.whole(None if self.least is None else tuple(resized))
            as_it_is = cut.pixels.shape[1:] if cut.inner is None else resized
            image = resize_by_pillow(cut, as_it_is, resample)
        return window(image, tuple(resized[::-1]), (left, top), self.size[::-1], resample, None)


def resized_size(size: Size, target: Size, area: float, aspect: float) -> Size:
    """Height and width that an image of ``size`` is resized to.

    Args:
        size: height and width of the image.
        target: those of the input, which the image just covers by itself.
        area: share of the covering image that the input is to show.
        aspect: by what its width over its height is stretched.
    """
    ratio = min(size[0] / target[0], size[1] / target[1])
    zoom, stretch = 1 / math.sqrt(area), math.sqrt(aspect)
    return round(size[0] * (zoom / stretch) / ratio), round(size[1] * (zoom * stretch) / ratio)


def keep_ratio_crop(
    image: Parts,
    numbers: Numbers,
    options: "AugmentOptions",
    size: Size,
    interpolation: str,
    least: ImageSize | None,
) -> Tensor:
    """The crop of the batch path: (3, *size), of the image's type.

    ``numbers``: the first six are for the crop. ``least``: as of :class:`KeepRatioCrop`.
    """
    area = between(numbers[1], *options.scale) if numbers[0] < PROBABILITY else 1.0
    low, high = map(math.log, options.ratio)
    aspect = math.exp(between(numbers[3], low, high)) if numbers[2] < PROBABILITY else 1.0
    resized = resized_size(image.size, size, area, aspect)
    if options.train_crop_mode == "rkrc":
        top, left = map(centre, resized, size)
    else:
        rooms = [length - side for length, side in zip(resized, size, strict=True)]
        places = zip((numbers[4], numbers[5]), rooms, strict=True)
        top, left = (int(math.copysign(int(n * (abs(room) + 1)), room)) for n, room in places)
    if not is_made_whole(image.size[::-1], resized[::-1]):
        whole = image.whole().pixels.permute(1, 2, 0).contiguous().numpy()
        resample = Image.Resampling[interpolation.upper()]
        place = resized[::-1], (left, top), size[::-1]
        return bytes_of(window(Image.fromarray(whole), *place, resample, None))
    pixels = resize(image.whole(None if least is None else resized), resized, interpolation)
    inside = pixels[:, max(0, top) : top + size[0], max(0, left) : left + size[1]]
    before = max(0, -top), max(0, -left)
    margins = [
        (first, side - first - length)
        for first, side, length in zip(before, size, inside.shape[1:], strict=True)
    ]
    if not any(map(sum, margins)):
        return inside
    return torch.from_numpy(np.pad(inside.numpy(), [(0, 0), *margins], mode="reflect"))
