"""Figures of a multi-label model: average precision, F1, thresholds, what it takes for what."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn import metrics

from tools.common.answers import BINS, Answers, bin_of, calibration
from tools.common.labels import THRESHOLD

PAIRS = 20  # of labels that are taken for each other
LEAST = float(np.finfo(np.float32).tiny)  # a probability whose logarithm is finite


class Curve(NamedTuple):
    """How a class does at every threshold, from the lowest."""

    thresholds: np.ndarray
    """(T,) those at which something changes."""
    precision: np.ndarray
    """(T,)."""
    recall: np.ndarray
    """(T,)."""

    @property
    def f1(self) -> np.ndarray:
        """(T,), 0 where precision and recall are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / np.where(both > 0, both, 1)


def curve(targets: np.ndarray, probabilities: np.ndarray) -> Curve:
    """The curve of a class from (N,) zeros and ones, of which some are 1, and probabilities."""
    precision, recall, thresholds = metrics.precision_recall_curve(targets, probabilities)
    return Curve(thresholds, precision[:-1], recall[:-1])


def figures(answers: Answers, thresholds: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The report's figures as plain values; shares are in 0-1.

    Average precision is that of scikit-learn, Σ (Rₙ - Rₙ₋₁) Pₙ. Means over classes leave out those
    that no image has, as in the log of training.

    Args:
        answers: with targets (N, C).
        thresholds: (C,).
        class_names: C.
    """
    targets, shares = answers.targets.astype(bool), answers.probabilities
    found = shares >= thresholds
    rows = list(_per_class(targets, shares, thresholds, class_names))
    there = [row for row in rows if row["images"]]
    return {
        "task": "multilabel",
        "images": len(targets),
        "unreadable": answers.bad,
        "map": _mean(there, "average_precision"),
        "micro_f1": _micro_f1(targets, shares >= THRESHOLD),
        "macro_f1": _mean(there, "f1_at_half"),
        "micro_f1_at_thresholds": _micro_f1(targets, found),
        "macro_f1_at_thresholds": _mean(there, "f1"),
        "exact_match": float((targets == found).all(1).mean()),
        "hamming_loss": float((targets != found).mean()),
        "log_loss": float(losses(targets, shares).mean()),
        "labels_per_image": {
            "true": np.bincount(targets.sum(1)).tolist(),
            "found": np.bincount(found.sum(1)).tolist(),
        },
        "top_probability": {"count": np.bincount(bin_of(shares.max(1)), minlength=BINS).tolist()},
        "calibration": calibration(shares.ravel(), targets.ravel()),
        "images_per_second": answers.images_per_second,
        "model_images_per_second": answers.model_images_per_second,
        "per_class": rows,
        "confused": confused(targets, found, class_names),
    }


def _per_class(
    targets: np.ndarray, shares: np.ndarray, thresholds: np.ndarray, class_names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for index, name in enumerate(class_names):
        true, share, threshold = targets[:, index], shares[:, index], float(thresholds[index])
        row: dict[str, Any] = {
            "class": name,
            "images": int(true.sum()),
            "predicted": int((share >= threshold).sum()),
            "average_precision": None,
            "threshold": threshold,
            **_at(true, share >= threshold),
            "f1_at_half": _at(true, share >= THRESHOLD)["f1"],
            "best_threshold": None,
            "best_f1": None,
        }
        if true.any():
            found = curve(true, share)
            best = int(found.f1.argmax())
            row["average_precision"] = float(metrics.average_precision_score(true, share))
            row["best_threshold"] = float(found.thresholds[best])
            row["best_f1"] = float(found.f1[best])
        yield row


def _at(targets: np.ndarray, found: np.ndarray) -> dict[str, float]:
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        targets, found, average="binary", zero_division=0
    )
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _micro_f1(targets: np.ndarray, found: np.ndarray) -> float:
    """F1 of all answers together, 0 where there is none."""
    return float(metrics.f1_score(targets, found, average="micro", zero_division=0))


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Over classes; None without any."""
    return float(np.mean([row[key] for row in rows])) if rows else None


def losses(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of each image, the mean of its classes: (N,) float64."""
    shares = probabilities.astype(np.float64)
    of_truth = np.where(targets, shares, 1 - shares)
    return -np.log(of_truth.clip(min=LEAST)).mean(1)


def confused(
    targets: np.ndarray, found: np.ndarray, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Pairs of a label that was missed and one that was found in its place on the same image, the
    most frequent first; at most ``PAIRS``."""
    missed, wrong = (targets & ~found).astype(np.int64), (found & ~targets).astype(np.int64)
    counts = missed.T @ wrong
    order = (-counts).ravel().argsort(kind="stable")[:PAIRS]
    pairs = (np.unravel_index(place, counts.shape) for place in order)
    return [
        {"missed": class_names[a], "found": class_names[b], "images": int(counts[a, b])}
        for a, b in pairs
        if counts[a, b]
    ]


def hardest(
    answers: Answers, thresholds: np.ndarray, class_names: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    """The images with a label missed or wrong, the largest loss first; ``index`` is the image's."""
    targets = answers.targets.astype(bool)
    found = answers.probabilities >= thresholds
    costs = losses(targets, answers.probabilities)
    wrong = np.flatnonzero((targets != found).any(1))
    order = wrong[np.argsort(-costs[wrong], kind="stable")][:limit]

    def named(row: int, chosen: np.ndarray) -> dict[str, float]:
        return {
            class_names[k]: float(answers.probabilities[row, k]) for k in np.flatnonzero(chosen)
        }

    return [
        {
            "index": int(answers.indices[i]),
            "loss": float(costs[i]),
            "right": named(i, targets[i] & found[i]),
            "missed": named(i, targets[i] & ~found[i]),
            "wrong": named(i, found[i] & ~targets[i]),
        }
        for i in order.tolist()
    ]
