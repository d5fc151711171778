"""Random numbers of a batch: a function of (seed, epoch, position) and what they are for."""

import copy
import math
from typing import TypeVar

import numpy as np

from utils import derive_seed

Share = TypeVar("Share", float, np.ndarray)
Word = TypeVar("Word", int, np.ndarray)
GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def _mix(x: Word) -> Word:
    """Of numbers of 64 bits: uint64, or int that may have more."""
    x = x & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def uniforms(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), (B, count) float64: a function of ``seed`` and each position alone.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in counter mode, with a stream per position.
    """
    start = _mix(positions.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(seed))
    places = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (_mix(start[:, None] + places) >> np.uint64(11)) * 2.0**-53


class Numbers:
    """Those of one image: ``uniforms(seed, [position], …)[0]``, each computed when it is looked at.

    A worker takes a few of them between decoding and resizing; an array of all takes it as long as
    reading the file.

    Args:
        seed: of epoch and purpose.
        position: the place of the epoch.
    """

    def __init__(self, seed: int, position: int) -> None:
        self._start = _mix(int(position) * GOLDEN + seed) + GOLDEN

    def __getitem__(self, place: int) -> float:
        return (_mix(self._start + place * GOLDEN) >> 11) * 2.0**-53

    def after(self, count: int) -> "Numbers":
        """Those behind the first ``count``."""
        rest = copy.copy(self)
        rest._start += count * GOLDEN
        return rest


def between(share: Share, low: float, high: float) -> Share:
    """``share`` (0 to 1) of the way from ``low`` to ``high``."""
    return low + (high - low) * share


class Draws:
    """Numbers of a batch for one purpose, handed out column by column.

    Args:
        seed: of the epoch.
        purpose: a number; each purpose has a stream of its own.
        positions: (B,) int64, places of the epoch.
        count: numbers per image that can be drawn.

    Raises ValueError when more are drawn.
    """

    def __init__(self, seed: int, purpose: int, positions: np.ndarray, count: int) -> None:
        self.values = uniforms(derive_seed(seed, purpose), positions, count)
        self.used = 0

    def uniform(self, *shape: int) -> np.ndarray:
        """(B, *shape), in [0, 1)."""
        count = math.prod(shape)
        taken = self.values[:, self.used : self.used + count]
        if taken.shape[1] < count:
            raise ValueError(f"more than {self.values.shape[1]} numbers were drawn")
        self.used += count
        return taken.reshape(len(taken), *shape)

    def normal(self, *shape: int) -> np.ndarray:
        """(B, *shape), standard normal (Box and Muller)."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(*shape)))
        return radius * np.cos(2 * np.pi * self.uniform(*shape))

    def sign(self, *shape: int) -> np.ndarray:
        """(B, *shape), −1 or 1."""
        return np.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def below(self, limit: np.ndarray) -> np.ndarray:
        """Whole numbers from 0 to ``limit`` − 1, of its shape (B, …)."""
        return (self.uniform(*limit.shape[1:]) * limit).astype(np.int64)
