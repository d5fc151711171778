"""Steps of ``pixel_ops`` on a CPU, with NumPy: it vectorises operations on bytes and bools that
torch does one by one there, and its calls cost less. The results are the same.
"""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)


def to_bytes(x: Tensor) -> Tensor:
    """Floats from 0 to 255, cut off."""
    return torch.from_numpy(x.numpy().astype(np.uint8))


def inverted_from(x: Tensor, threshold: Tensor) -> Tensor:
    """uint8 (n, …) inverted from ``threshold`` on, (n, 1, …) int16 from 0 to 256."""
    pixels, limit = x.numpy(), threshold.numpy()
    # Bytes are compared with bytes, which never reach 256.
    high = (pixels >= np.minimum(limit, 255).astype(np.uint8)).view(np.uint8)
    high *= np.where(limit > 255, 0, 255).astype(np.uint8)
    high ^= pixels
    return torch.from_numpy(high)


def histograms(levels: Tensor) -> Tensor:
    """Levels, (n, 3, P) uint8, to (n, 3, 256) counts."""
    counts = [torch.bincount(channel, minlength=256) for channel in levels.flatten(0, 1)]
    return torch.stack(counts).view(*levels.shape[:2], 256)


def look_up(table: Tensor, levels: Tensor) -> Tensor:
    """The value in ``table``, (n, 3, 256) uint8, of each level, (n, 3, P) uint8."""
    found = torch.empty_like(levels)
    channels = (t.flatten(0, 1).numpy() for t in (found, levels, table))
    for new, old, values in zip(*channels, strict=True):
        new[:] = np.frombuffer(old.tobytes().translate(values.tobytes()), np.uint8)
    return found


def taps(part: Array, cubic: bool) -> dict[int, Array]:
    """Weights of pixels around a place ``part`` (0 to 1) after pixel 0, by their number."""
    if not cubic:
        return {0: 1 - part, 1: part}
    square = part * part
    cube = square * part
    # Pillow's cubic kernel has a = −1.
    return {
        -1: 2 * square - part - cube,
        0: 1 - 2 * square + cube,
        1: part + square - cube,
        2: cube - square,
    }


def shift_rows(x: Tensor, shift: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """Each row of uint8 (n, 3, H, W) from ``shift`` (n, H) pixels further right."""
    width, shifts = x.shape[3], shift.numpy()
    whole = np.floor(shifts)
    weights = taps(shifts - whole, cubic)
    first, last = min(weights), max(weights)
    windows = _windows(x.numpy(), whole.astype(np.int64) + first, width + last - first)
    source, values = torch.from_numpy(windows).float(), None
    for tap, weight in weights.items():
        part = source[..., tap - first : tap - first + width]
        of_row = torch.from_numpy(weight[:, None, :, None])
        values = part * of_row if values is None else values.addcmul_(part, of_row)
    place = (np.arange(width, dtype=np.float32) + np.float32(0.5)) + shifts[..., None]  # (n, H, W)
    inside = (place >= 0) & (place < width)
    # Cut off like Pillow's, which doesn't see the 1e-3 that single precision may be off by.
    return _levels_inside(values.add_(1e-3), inside, fill)


def shift_columns(x: Tensor, shift: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """As ``shift_rows``: each column from ``shift`` (n, W) pixels further down."""
    moved = shift_rows(_transposed(x), shift, cubic, fill)
    return _transposed(moved)


def _transposed(x: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.numpy().swapaxes(2, 3)))


def rotate(x: Tensor, degrees: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) turned counter-clockwise around the middle by ``degrees``, (n,)."""
    n, _, height, width = x.shape
    angle = degrees.numpy() * np.float32(-np.pi / 180)
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    down = (np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2))[:, None]
    right = np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)
    columns = cos * right + sin * down  # (n, H, W), pixels from the middle
    rows = cos * down - sin * right
    grid = np.empty((n, height, width, 2), dtype=np.float32)
    np.multiply(columns, np.float32(2 / width), out=grid[..., 0])
    np.multiply(rows, np.float32(2 / height), out=grid[..., 1])
    turned = F.grid_sample(
        x.float(),
        torch.from_numpy(grid),
        mode="bicubic" if cubic else "bilinear",
        padding_mode="border",
        align_corners=False,
    )
    inside = np.abs(columns, out=columns) <= width / 2
    inside &= np.abs(rows, out=rows) <= height / 2
    return _levels_inside(turned, inside, fill)


def _levels_inside(values: Tensor, inside: np.ndarray, fill: Tensor) -> Tensor:
    """Floats as Pillow stores them where a place is ``inside``, (n, H, W) bool; else ``fill``."""
    result = values.clamp_(0, 255).numpy().astype(np.uint8)
    mask = inside.view(np.uint8)
    mask *= 255
    # A mask of bytes chooses without a branch.
    colour = fill.numpy()[:, None, None]
    result ^= colour
    result &= mask[:, None]
    result ^= colour
    return torch.from_numpy(result)


def _windows(x: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    """``length`` pixels of each row from number ``first`` (n, H) on: uint8 (n, 3, H, length).

    Beyond its ends a row goes on as it ends. Rows are copied whole, which beats an index for every
    pixel.
    """
    n, channels, height, width = x.shape
    first = first.clip(-length, width)
    before, after = max(0, -int(first.min())), max(width, int(first.max()) + length)
    padded = np.empty((n, channels, height, before + after), dtype=np.uint8)
    padded[..., :before], padded[..., before + width :] = x[..., :1], x[..., -1:]
    padded[..., before : before + width] = x
    rows, places = n * channels * height, before + after - length + 1
    starts = np.repeat((first + before)[:, None], channels, axis=1).ravel()
    every = as_strided(padded, (rows, places, length), (before + after, 1, 1))
    return every[np.arange(rows), starts].reshape(n, channels, height, length)
