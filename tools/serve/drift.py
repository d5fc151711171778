"""Do the images that are asked about look like those the model was evaluated on?

Two figures over the last answers: the population stability index of the class mix, and the
Kolmogorov-Smirnov distance of the confidences.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bounded
from errors import UserError, os_error_text

MOST_BYTES = 64 << 20  # of report.json
PSI_LIMIT = 0.2  # by custom "a large shift"
KS_LIMIT = 0.1
CHANCE = 0.001  # of a warning although nothing has changed, in one check


@dataclass(frozen=True)
class Reference:
    """The model's answers to the validation images."""

    classes: np.ndarray
    """(C,) answers of each class."""
    confidences: np.ndarray
    """(B,) answers in equal bins (low, high] of the confidence."""

    @classmethod
    def read(cls, path: Path, class_names: list[str]) -> "Reference":
        """From the ``report.json`` of ``tools.report``. Raises UserError."""
        try:
            content = bounded.read_json(path, MOST_BYTES)
            names = [row["class"] for row in content["per_class"]]
            classes = _counts([row["predicted"] for row in content["per_class"]])
            confidences = _counts(content["calibration"]["bins"]["count"])
        except OSError as error:
            raise UserError(f"--reference: {os_error_text(error, path)}") from None
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(
                f"--reference: {path} is no report.json: python -m tools.report MODEL writes one"
            ) from None
        if names != class_names:
            raise UserError(f"--reference: {path} is of a model with other classes")
        return cls(classes, confidences)


def _counts(numbers: list[float]) -> np.ndarray:
    """(N,) float64. Raises ValueError where there is none, or one below zero or not finite."""
    counts = np.array(numbers, dtype=float)
    if counts.ndim != 1 or not counts.size or not np.isfinite(counts).all() or counts.min() < 0:
        raise ValueError
    return counts


def stability_index(reference: np.ndarray, observed: np.ndarray) -> float:
    """Population stability index Σ (pᵢ - qᵢ) ln(pᵢ / qᵢ) of two rows of counts.

    Half a count is added everywhere, so that an empty class costs much and not all.
    """
    p, q = ((x + 0.5) / (x + 0.5).sum() for x in (reference, observed))
    return float(((p - q) * np.log(p / q)).sum())


def distance(reference: np.ndarray, observed: np.ndarray) -> float:
    """Greatest difference of the cumulative shares of two rows of counts."""
    p, q = (x.cumsum() / x.sum() for x in (reference, observed))
    return float(np.abs(p - q).max())


def limits(reference: Reference, count: int) -> tuple[float, float]:
    """Of the index and the distance of ``count`` answers: what neither custom nor chance explains.

    Without drift PSI / (1/n + 1/m) follows χ² of C - 1 degrees ("The Population Stability Index",
    Yurdakul 2018), and the distance stays below √(-ln(α/2)/2) √(1/n + 1/m).
    """
    from scipy import special  # only who compares pays for it

    noise = 1 / count + 1 / reference.classes.sum()
    by_chance = special.chdtri(max(1, len(reference.classes) - 1), CHANCE) * noise
    ks_by_chance = np.sqrt(-np.log(CHANCE / 2) / 2 * noise)
    return max(PSI_LIMIT, float(by_chance)), max(KS_LIMIT, float(ks_by_chance))


@dataclass(frozen=True)
class Drift:
    """How the last answers differ from the reference."""

    index: float
    """Population stability index of the class mix."""
    distance: float
    """Kolmogorov-Smirnov distance of the confidences."""
    classes: bool
    """Whether the class mix is beyond its limit."""
    confidence: bool
    """Whether the confidences are."""


class DriftMonitor:
    """The last ``window`` answers against the reference; not before ``window`` have come."""

    def __init__(self, reference: Reference, window: int) -> None:
        self.reference, self.window = reference, window
        self._limits = limits(reference, window)
        self._last: deque[tuple[int, int]] = deque()
        self._classes = np.zeros_like(reference.classes)
        self._confidences = np.zeros_like(reference.confidences)

    def add(self, index: int, confidence: float) -> None:
        """Take note of one answer: the likeliest class and its probability."""
        bins = len(self._confidences)
        place = min(bins - 1, max(0, int(np.ceil(confidence * bins)) - 1))
        self._count(index, place, 1)
        self._last.append((index, place))
        if len(self._last) > self.window:
            self._count(*self._last.popleft(), -1)

    def check(self) -> Drift | None:
        """How the last answers differ; None before the window is full."""
        if len(self._last) < self.window:
            return None
        index = stability_index(self.reference.classes, self._classes)
        gap = distance(self.reference.confidences, self._confidences)
        most_index, most_gap = self._limits
        return Drift(index, gap, index > most_index, gap > most_gap)

    def largest_change(self, class_names: list[str]) -> dict[str, Any]:
        """The class whose share has changed most: name, share before, share now."""
        before = self.reference.classes / self.reference.classes.sum()
        now = self._classes / max(1, len(self._last))
        most = int(np.abs(now - before).argmax())
        return {"class": class_names[most], "before": float(before[most]), "now": float(now[most])}

    def _count(self, index: int, place: int, by: int) -> None:
        self._classes[index] += by
        self._confidences[place] += by
