"""Exact results of an evaluation with any number of labels per image.

Average precision and the best thresholds follow from the order of all scores of a class, so the
scores are kept: N × K float32 and N × K bytes in host memory, spread over the processes as the
images are. They are exchanged a few classes at a time (``MOST_GATHERED``), and each process ranks
its share of the classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distributed.processes import all_reduce_sum, gather, world_size
from optimization.counts import LOSS_UNIT, Counts, Evaluation

MOST_GATHERED = 64 << 20  # bytes of scores of all processes that one has at a time
_ON_DEVICE = 32  # batches whose scores wait there
DEFAULT_THRESHOLD = 0.5
nan = float("nan")
# What is found of a class.
_FIELDS = ("positives", "ap", "hits", "answers", "threshold", "best_hits", "best_answers")


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Exact results over a data set, of all processes together.

    Classes without a positive image have no average precision and no F1: they are left out of the
    means over classes. Their wrong answers count in the micro averages.
    """

    loss: float
    """Mean binary cross-entropy over images and classes, without weights and smoothing."""
    count: int
    """Images evaluated."""
    positives: np.ndarray
    """(K,) int64, images with the label."""
    ap: np.ndarray
    """(K,) average precision, 0–1; NaN without positives."""
    hits: np.ndarray
    """(K,) int64, right ones of the answers at a threshold of 0.5."""
    answers: np.ndarray
    """(K,) int64, images given the label at 0.5."""
    thresholds: np.ndarray
    """(K,) probabilities from which a label counts as there; 0.5 without positives."""
    best_hits: np.ndarray
    """(K,) int64, as ``hits`` at those thresholds."""
    best_answers: np.ndarray
    """(K,) int64, as ``answers`` at those thresholds."""

    @property
    def f1(self) -> np.ndarray:
        """(K,) F1 at 0.5, 0–1; NaN without positives."""
        return self._f1(self.hits, self.answers)

    @property
    def best_f1(self) -> np.ndarray:
        """(K,) F1 at ``thresholds``, 0–1; NaN without positives."""
        return self._f1(self.best_hits, self.best_answers)

    def _f1(self, hits: np.ndarray, answers: np.ndarray) -> np.ndarray:
        return np.where(self.positives > 0, 2 * hits / np.maximum(answers + self.positives, 1), nan)

    def scores(self) -> dict[str, float]:
        """What is logged, by the second part of its key; all but the loss in %."""
        return {
            "loss": self.loss,
            "map": _percent(self.ap),
            "micro_f1": self._micro(self.hits, self.answers),
            "macro_f1": _percent(self.f1),
            "micro_f1_best": self._micro(self.best_hits, self.best_answers),
            "macro_f1_best": _percent(self.best_f1),
        }

    def _micro(self, hits: np.ndarray, answers: np.ndarray) -> float:
        """F1 of all answers together, %."""
        whole = int(answers.sum() + self.positives.sum())
        return 100.0 * 2 * int(hits.sum()) / whole if whole else 0.0

    def left_out(self) -> int:
        """Number of classes without a positive image."""
        return int((self.positives == 0).sum())

    def of_classes(self, places: Sequence[int]) -> "MultiLabelEvaluation":
        """The results of some classes."""
        arrays = {k: v[list(places)] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)

    def table(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """A header and a row for each class; AP and F1 in %, empty without positives."""
        rows: list[tuple[Any, ...]] = [
            ("class", "positives", "ap", "f1", "threshold", "f1_at_threshold")
        ]
        columns = (self.positives, self.ap, self.f1, self.thresholds, self.best_f1)
        for name, count, ap, f1, threshold, best in zip(names, *columns, strict=True):
            rows.append((name, int(count), _cell(ap), _cell(f1), f"{threshold:.4f}", _cell(best)))
        return rows


def _cell(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.2f}"


def _percent(shares: np.ndarray) -> float:
    known = shares[~np.isnan(shares)]
    return 100.0 * float(known.mean()) if len(known) else 0.0


Result = Evaluation | MultiLabelEvaluation
"""Of an evaluation, whatever the task."""


# --- one class ------------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The logistic function in float64."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


def rank_class(
    logits: np.ndarray, present: np.ndarray, threshold: float | None = None
) -> dict[str, float]:
    """What is found of one class.

    Average precision is Σ (R_n - R_{n-1}) P_n over the distinct scores from the highest down, as
    scikit-learn's ``average_precision_score``: images of equal score come together, so their order
    doesn't matter. The best threshold has the greatest F1 of all, and of several such it is the
    one nearest to 0.5; it lies half-way between two scores.

    Args:
        logits: (N,) scores.
        present: (N,) whether each image has the label.
        threshold: a probability that is given instead of found.
    """
    order = np.argsort(-logits, kind="stable")
    ranked, there = logits[order], present[order].astype(bool)
    ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True]) if len(ranked) else []
    hits = np.cumsum(there)[ends].astype(np.int64) if len(ranked) else np.zeros(0, np.int64)
    answers = np.asarray(ends, dtype=np.int64) + 1
    likely = probabilities(ranked[ends]) if len(ranked) else np.zeros(0)
    positives = int(there.sum())
    found: dict[str, float] = {"positives": positives, "ap": nan}
    if positives:
        gains = np.diff(hits, prepend=0) / positives
        found["ap"] = float((gains * hits / answers).sum())
    if threshold is None:
        threshold = _best_threshold(likely, hits, answers, positives)
    for prefix, least in (("", DEFAULT_THRESHOLD), ("best_", threshold)):
        cut = int((likely >= least).sum())
        found[f"{prefix}hits"] = int(hits[cut - 1]) if cut else 0
        found[f"{prefix}answers"] = int(answers[cut - 1]) if cut else 0
    found["threshold"] = threshold
    return found


def _best_threshold(
    likely: np.ndarray, hits: np.ndarray, answers: np.ndarray, positives: int
) -> float:
    """The threshold of the greatest F1 by probabilities that fall, with the counts down to each."""
    if not positives:
        return DEFAULT_THRESHOLD
    f1 = 2 * hits / (answers + positives)
    below = np.append(likely[1:], 0.0)
    cuts = (likely + below) / 2
    cuts = np.where(cuts > below, cuts, likely)
    best = np.flatnonzero(f1 == f1.max())
    return float(cuts[best[np.abs(cuts[best] - DEFAULT_THRESHOLD).argmin()]])


# --- all classes, over processes ------------------------------------------------------------------


class MultiLabelCounts:
    """The scores and labels of an evaluation.

    Args:
        num_classes: K.
        device: where the logits are.
        thresholds: (K,) probabilities that are given instead of found.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.thresholds = thresholds
        self.shared = False
        # Loss in units, images, losses that are not finite.
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Take a batch: ``logits`` (B, K) float32, ``targets`` (B, K), 1 where a label is there."""
        losses = F.binary_cross_entropy_with_logits(
            logits.double(), targets.double(), reduction="none"
        ).mean(1)
        finite = torch.isfinite(losses)
        self.sums[0] += (torch.where(finite, losses, 0.0) / LOSS_UNIT).round().long().sum()
        self.sums[1] += len(losses)
        self.sums[2] += (~finite).sum()
        self._waiting.append((logits, targets > 0.5))
        if len(self._waiting) >= _ON_DEVICE:
            self._keep()

    def _keep(self) -> None:
        """Move what waits on the device to the host."""
        if self._waiting:
            logits, present = map(torch.cat, zip(*self._waiting, strict=True))
            self._kept.append((logits.cpu(), present.to(torch.uint8).cpu()))
            self._waiting = []

    def add_up(self) -> None:
        """Take the scores of all processes together."""
        self.shared = True
        all_reduce_sum(self.sums)

    def result(self) -> MultiLabelEvaluation:
        """To be called by all processes alike after :meth:`add_up`."""
        self._keep()
        none = torch.zeros(0, self.num_classes), torch.zeros(0, self.num_classes, dtype=torch.uint8)
        logits, present = map(torch.cat, zip(*(self._kept or [none]), strict=True))
        self._kept = []
        table = self._ranked(torch.nan_to_num(logits, nan=-math.inf), present)
        loss_units, count, bad = self.sums.tolist()
        columns = dict(zip(_FIELDS, table.T, strict=True))
        ap, thresholds = columns.pop("ap"), columns.pop("threshold")
        whole = {name: values.astype(np.int64) for name, values in columns.items()}
        return MultiLabelEvaluation(
            loss=nan if bad or not count else loss_units * LOSS_UNIT / count,
            count=count,
            ap=ap,
            thresholds=thresholds,
            **whole,
        )

    def _ranked(self, logits: Tensor, present: Tensor) -> np.ndarray:
        """(K, fields) of all classes, each ranked by one process."""
        together = self.shared and dist.is_initialized()
        world, rank = (world_size(), dist.get_rank()) if together else (1, 0)
        rows = gather(len(logits)) if together else [len(logits)]
        width = max(1, MOST_GATHERED // (5 * world * max(1, *rows, 1)))
        table = np.zeros((self.num_classes, len(_FIELDS)))
        for number, start in enumerate(range(0, self.num_classes, width)):
            part = slice(start, start + width)
            scores, there = logits[:, part], present[:, part]
            if together:
                scores, there = _of_all(scores, rows), _of_all(there, rows)
            if number % world == rank:
                self._rank_columns(table, start, scores.numpy(), there.numpy())
        return sum(gather(table)) if together else table

    def _rank_columns(
        self, table: np.ndarray, start: int, scores: np.ndarray, there: np.ndarray
    ) -> None:
        """Fill the rows of ``table`` from ``start`` on with the classes of these columns."""
        for column in range(scores.shape[1]):
            given = None if self.thresholds is None else self.thresholds[start + column]
            found = rank_class(scores[:, column], there[:, column], given)
            table[start + column] = [found[field] for field in _FIELDS]


def _of_all(columns: Tensor, rows: Sequence[int]) -> Tensor:
    """The columns of all processes, one's rows after another's; each has ``rows`` of its own."""
    most = max(rows)
    padded = columns.new_zeros(most, columns.shape[1])
    padded[: len(columns)] = columns
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def counts_of(
    task: str,
    num_classes: int,
    device: torch.device,
    thresholds: Sequence[float] | None = None,
) -> Counts | MultiLabelCounts:
    """What counts the answers of an evaluation of this ``--task``, see ``MultiLabelCounts``."""
    if task == "multilabel":
        return MultiLabelCounts(num_classes, device, thresholds)
    return Counts(num_classes, device)
