"""Sizes of images: one number for a square, else height and width."""

from collections.abc import Sequence

ImageSize = int | tuple[int, int]
"""Pixels of a square's side, or height and width."""


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Both sides of ``size``. Raises ValueError for other than one or two numbers."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def shortest(size: int | Sequence[int]) -> ImageSize:
    """``size`` as it is saved: one number where both sides are equal."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def size_text(size: int | Sequence[int]) -> str:
    """``size`` for people: "224", or "192×256", height first."""
    height, width = height_width(size)
    return str(height) if height == width else f"{height}×{width}"
