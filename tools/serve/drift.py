"""Do the images that are asked about look like those the model was evaluated on?

Two figures over the last answers: the population stability index of the class mix, and the
Kolmogorov-Smirnov distance of the confidences. Of a multi-label model the index is that of each
label, there or not, and the largest counts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bounded
from checkpointing.files import MULTILABEL
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
    """(B,) answers in equal bins (low, high] of the confidence, the highest of each answer."""
    several: bool = False
    """Whether an answer may have any number of the classes: multi-label."""

    @property
    def answers(self) -> float:
        return float(self.confidences.sum())

    @classmethod
    def read(cls, path: Path, class_names: list[str], *, several: bool = False) -> "Reference":
        """From the ``report.json`` of ``tools.report``, of a multi-label model (``several``) or
        another. Raises UserError."""
        try:
            content = bounded.read_json(path, MOST_BYTES)
            names = [row["class"] for row in content["per_class"]]
            classes = _counts([row["predicted"] for row in content["per_class"]])
            labels = content.get("task") == MULTILABEL
            bins = content["top_probability"] if labels else content["calibration"]["bins"]
            confidences = _counts(bins["count"])
            if classes.max() > confidences.sum():
                raise ValueError
        except OSError as error:
            raise UserError(f"--reference: {os_error_text(error, path)}") from None
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(
                f"--reference: {path} is no report.json: python -m tools.report MODEL writes one"
            ) from None
        if names != class_names:
            raise UserError(f"--reference: {path} is of a model with other classes")
        if labels != several:
            raise UserError(f"--reference: {path} is of a model of another --task")
        return cls(classes, confidences, several)


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


def label_indices(
    reference: np.ndarray, images: float, observed: np.ndarray, seen: float
) -> np.ndarray:
    """(C,) :func:`stability_index` of each label, there or not.

    Args:
        reference: (C,) of how many of ``images`` each label was found.
        observed: (C,) the same of ``seen`` others.
    """
    pairs = zip(reference, observed, strict=True)
    return np.array(
        [stability_index(np.array([a, images - a]), np.array([b, seen - b])) for a, b in pairs]
    )


def distance(reference: np.ndarray, observed: np.ndarray) -> float:
    """Greatest difference of the cumulative shares of two rows of counts."""
    p, q = (x.cumsum() / x.sum() for x in (reference, observed))
    return float(np.abs(p - q).max())


def limits(reference: Reference, count: int) -> tuple[float, float]:
    """Of the index and the distance of ``count`` answers: what neither custom nor chance explains.

    Without drift PSI / (1/n + 1/m) follows χ² of C - 1 degrees ("The Population Stability Index",
    Yurdakul 2018), that of a label, there or not, of one degree, and the largest of C labels stays
    below the point of α/C. The distance stays below √(-ln(α/2)/2) √(1/n + 1/m).
    """
    from scipy import special  # only who compares pays for it

    noise, classes = 1 / count + 1 / reference.answers, len(reference.classes)
    degrees, chance = (1, CHANCE / classes) if reference.several else (classes - 1, CHANCE)
    by_chance = special.chdtri(max(1, degrees), chance) * noise
    ks_by_chance = np.sqrt(-np.log(CHANCE / 2) / 2 * noise)
    return max(PSI_LIMIT, float(by_chance)), max(KS_LIMIT, float(ks_by_chance))


@dataclass(frozen=True)
class Drift:
    """How the last answers differ from the reference."""

    index: float
    """Population stability index of the class mix; of labels the largest."""
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
        self._last: deque[tuple[Sequence[int], int]] = deque()
        self._classes = np.zeros_like(reference.classes)
        self._confidences = np.zeros_like(reference.confidences)

    def add(self, classes: Sequence[int], confidence: float) -> None:
        """Take note of one answer: its class, or its labels, and the highest probability."""
        bins = len(self._confidences)
        place = min(bins - 1, max(0, int(np.ceil(confidence * bins)) - 1))
        self._count(classes, place, 1)
        self._last.append((classes, place))
        if len(self._last) > self.window:
            self._count(*self._last.popleft(), -1)

    def check(self) -> Drift | None:
        """How the last answers differ; None before the window is full."""
        if len(self._last) < self.window:
            return None
        index = self._index()
        gap = distance(self.reference.confidences, self._confidences)
        most_index, most_gap = self._limits
        return Drift(index, gap, index > most_index, gap > most_gap)

    def largest_change(self, class_names: list[str]) -> dict[str, Any]:
        """The class whose share has changed most: name, share before, share now."""
        before, now = self.rates()
        changes = self._label_indices() if self.reference.several else np.abs(now - before)
        most = int(changes.argmax())
        return {"class": class_names[most], "before": float(before[most]), "now": float(now[most])}

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of the answers that have each class, (C,): of the reference, of the last ones."""
        return (
            self.reference.classes / self.reference.answers,
            self._classes / max(1, len(self._last)),
        )

    def _index(self) -> float:
        if self.reference.several:
            return float(self._label_indices().max())
        return stability_index(self.reference.classes, self._classes)

    def _label_indices(self) -> np.ndarray:
        reference = self.reference
        return label_indices(reference.classes, reference.answers, self._classes, len(self._last))

    def _count(self, classes: Sequence[int], place: int, by: int) -> None:
        for index in classes:
            self._classes[index] += by
        self._confidences[place] += by
