"""A window on a resized image, also where the resized image would be too large to be made.

A file of 225 bytes may hold 50,000 × 1 pixels; with a short side of 256 they become 12.8 million ×
256. Where a resized image is larger than a photograph, and than what it is made of, the window is
resized from its own part of the source. Elsewhere the whole is resized and cut, which gives the
pixels of timm and torchvision to the last bit.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

MOST_PIXELS = 1 << 24  # of a resized image that is made whole

Size = tuple[int, int]
"""Width and height, as Pillow has them."""


def short_side(size: Size, side: int) -> Size:
    """``size`` with a short side of ``side`` pixels, and the long one as torchvision rounds it."""
    width, height = size
    long = int(side * max(size) / min(size))
    return (side, long) if width <= height else (long, side)


def around(size: Size, target: Size) -> Size:
    """``size`` in its proportions as small as ``target`` allows that lies within it.

    Squares are rounded as by torchvision's ``Resize``, others as by timm's ``ResizeKeepRatio``.
    """
    if target[0] == target[1]:
        return short_side(size, target[0])
    ratio = min(size[0] / target[0], size[1] / target[1])
    return round(size[0] / ratio), round(size[1] / ratio)


def within(size: Size, target: Size) -> Size:
    """``size`` in its proportions as large as it fits into ``target``, rounded as timm does; at
    least 1 pixel each."""
    ratio = max(size[0] / target[0], size[1] / target[1])
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def is_made_whole(size: Size, resized: Size) -> bool:
    """Whether an image of ``size`` may be resized to ``resized`` as a whole."""
    return resized[0] * resized[1] <= max(size[0] * size[1], MOST_PIXELS)


def centre(length: int, side: int) -> int:
    """Where a window of ``side`` pixels in the middle of ``length`` begins, as in torchvision;
    below 0 where it is the longer one."""
    return -((side - length) // 2) if side > length else round((length - side) / 2)


def window(
    image: Image.Image,
    resized: Size,
    corner: tuple[int, int],
    size: Size,
    resample: Image.Resampling,
    fill: Sequence[int] | None = (0, 0, 0),
) -> Image.Image:
    """A rectangle of an image after resizing.

    Args:
        image: of any size.
        resized: width and height that it is resized to.
        corner: left and top of the rectangle in the resized image; it may lie partly outside.
        size: width and height of the rectangle.
        resample: Pillow's filter.
        fill: the colour outside, a value for each channel; None: the image is mirrored there,
            without its border pixels.
    """
    box = [max(0, place) for place in corner]  # what lies inside
    box += [min(whole, c + side) for whole, c, side in zip(resized, corner, size, strict=True)]
    if is_made_whole(image.size, resized):
        part = image if image.size == resized else image.resize(resized, resample)
        part = part.crop(tuple(box))
    else:
        scale = [length / new for length, new in zip(image.size, resized, strict=True)] * 2
        source = np.minimum(np.multiply(box, scale), image.size * 2)
        part = image.resize((box[2] - box[0], box[3] - box[1]), resample, tuple(source.tolist()))
    if part.size == size:
        return part
    left, top = box[0] - corner[0], box[1] - corner[1]
    if fill is None:
        pixels = np.asarray(part)
        margins = (top, size[1] - top - part.height), (left, size[0] - left - part.width), (0, 0)
        return Image.fromarray(np.pad(pixels, margins[: pixels.ndim], mode="reflect"))
    whole = Image.new(image.mode, size, tuple(fill) if len(fill) > 1 else fill[0])
    whole.paste(part, (left, top))
    return whole
