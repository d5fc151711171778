"""Images that Pillow has no mode for: crops, channel by channel, and how people are shown them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from augmentation.windows import Size, window

_DEEPEST = 65535
_SHOWN = (2, 98)  # percentiles that a band is stretched from and to
_COMPOSITE = 3  # bands that are shown


def window_of_bands(
    image: Tensor,
    resized: Size,
    corner: tuple[int, int],
    size: Size,
    resample: Image.Resampling,
    fill: Sequence[int] | None,
) -> Tensor:
    """As :func:`augmentation.windows.window`, of uint8 or uint16 (C, H, W).

    16 bits are resized as float32 and rounded.
    """
    kind = image.dtype
    parts = []
    for number, band in enumerate(image.numpy()):
        whole = Image.fromarray(band if kind == torch.uint8 else band.astype(np.float32))
        colour = None if fill is None else fill[number : number + 1]
        parts.append(np.asarray(window(whole, resized, corner, size, resample, colour)))
    pixels = np.stack(parts)
    if kind == torch.uint8:
        return torch.from_numpy(pixels)
    return torch.from_numpy(np.rint(pixels.clip(0, _DEEPEST)).astype(np.uint16))


def resized_bands(image: Tensor, size: Size) -> Tensor:
    """uint8 or uint16 (C, H, W) in another width and height, bicubic, as evaluation resizes."""
    return window_of_bands(image, size, (0, 0), size, Image.Resampling.BICUBIC, None)


def rounded(values: Tensor) -> Tensor:
    """Floats as levels of 16 bits."""
    return values.clamp(0, _DEEPEST).round_().to(torch.uint16)


def composite(pixels: np.ndarray) -> Image.Image:
    """Bands (C, H, W) as an RGB image: uint8 greys and three colours as they are, else the first
    three bands, of two the first alone, each stretched from its 2nd to its 98th percentile."""
    chosen = pixels[:_COMPOSITE] if len(pixels) >= _COMPOSITE else pixels[:1]
    if chosen.dtype == np.uint8 and len(pixels) in (1, 3):
        stretched = chosen
    else:
        low, high = np.percentile(chosen, _SHOWN, axis=(1, 2), keepdims=True)
        scale = 255 / np.maximum(high - low, 1e-9)
        stretched = np.rint(((chosen - low) * scale).clip(0, 255)).astype(np.uint8)
    levels = np.broadcast_to(stretched, (_COMPOSITE, *chosen.shape[1:]))
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
