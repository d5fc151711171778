"""Perspective by the batch: uint8 (n, 3, H, W) in and out, on any device.

Draws and coefficients are those of torchvision's ``RandomPerspective``.
"""

import numpy as np
from torch import Tensor

from augmentation.draws import Draws
from augmentation.sampling import middles, sampled


def corner_shifts(draws: Draws, size: tuple[int, int], scale: float) -> np.ndarray:
    """How far each corner moves inwards, (B, 4, 2) whole pixels as x and y: top left, top right,
    bottom right, bottom left; up to ``scale`` of half of the image's ``size`` (height, width)."""
    height, width = size
    reach = np.array([int(scale * (width // 2)), int(scale * (height // 2))])
    return np.floor(draws.uniform(4, 2) * (reach + 1)).astype(np.int64)


def perspective_coefficients(shifts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """a … h, (B, 8) float32, by which a pixel (x, y) comes from (ax + by + c) / (gx + hy + 1),
    (dx + ey + f) / (gx + hy + 1), where the corners move by ``shifts`` (B, 4, 2)."""
    height, width = size
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    x, y = np.moveaxis((corners + inwards * shifts).astype(np.float64), 2, 0)  # (B, 4) each
    u, v = corners.T.astype(np.float64)
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = [
        np.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1),
        np.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1),
    ]
    matrix = np.stack(rows, 2).reshape(len(x), 8, 8)
    wanted = np.broadcast_to(corners.reshape(8, 1), (len(x), 8, 1)).astype(np.float64)
    return np.linalg.solve(matrix, wanted)[..., 0].astype(np.float32)


def perspective(x: Tensor, coefficients: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """What ``coefficients`` (n, 8) say, around it ``fill``, (3,) uint8."""
    height, width = x.shape[2:]
    down, right = middles(height, x)[:, None], middles(width, x)
    a, b, c, d, e, f, g, h = coefficients[:, :, None, None].unbind(1)  # (n, 1, 1)
    depth = g * right + h * down + 1  # (n, H, W)
    columns = (a * right + b * down + c) / depth
    rows = (d * right + e * down + f) / depth
    return sampled(x, columns - width / 2, rows - height / 2, cubic, fill)
