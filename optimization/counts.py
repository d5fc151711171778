"""Exact results of an evaluation, counted in integers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.processes import all_reduce_sum

# Losses are added up as integers of this fraction: sums of integers don't depend on their order, so
# every number of processes gives the same digits.
LOSS_UNIT = 2.0**-20

# In a table of several right classes per image: no class at all, and one the model can't answer.
PADDING, NO_OUTPUT = -1, -2


@dataclass(frozen=True)
class Evaluation:
    """Exact results over a data set, of all processes together."""

    loss: float
    """Mean cross-entropy."""
    acc1: float
    """Top-1 accuracy, %."""
    acc5: float | None
    """Top-5 accuracy, %; None below five classes."""
    count: int
    """Images evaluated."""
    correct_per_class: Tensor
    """(C,) int64, right answers."""
    count_per_class: Tensor
    """(C,) int64, images."""
    predicted_per_class: Tensor
    """(C,) int64, answers."""

    def of_classes(self, places: Sequence[int]) -> "Evaluation":
        """The results of some classes."""
        per_class = ("correct_per_class", "count_per_class", "predicted_per_class")
        return replace(self, **{name: getattr(self, name)[list(places)] for name in per_class})

    def table(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """A header and a row for each class; its accuracy in %, empty without images."""
        rows: list[tuple[Any, ...]] = [("class", "images", "correct", "accuracy")]
        counts, hits = self.count_per_class.tolist(), self.correct_per_class.tolist()
        for name, count, right in zip(names, counts, hits, strict=True):
            rows.append((name, count, right, f"{100 * right / count:.2f}" if count else ""))
        return rows

    def scores(self) -> dict[str, float]:
        """What is logged, by the second part of its key.

        ``balanced_acc`` is the mean of the accuracies per class, in %, and ``worst_class_acc`` the
        least, both of the classes with images. ``macro_f1`` is the mean F1 in %, 2 TP / (images +
        answers), of the classes with images or answers, as scikit-learn has it.
        """
        right, images, answers = (
            counts.double()
            for counts in (self.correct_per_class, self.count_per_class, self.predicted_per_class)
        )
        accuracies = (right / images)[images > 0]
        f1 = (2 * right / (images + answers))[images + answers > 0]
        none = not len(accuracies)
        return {
            "loss": self.loss,
            "acc1": self.acc1,
            **({} if self.acc5 is None else {"acc5": self.acc5}),
            "balanced_acc": 0.0 if none else 100 * accuracies.mean().item(),
            "macro_f1": 0.0 if none else 100 * f1.mean().item(),
            "worst_class_acc": 0.0 if none else 100 * accuracies.min().item(),
        }


class Counts:
    """Integer counts of an evaluation, on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        # Right answers, images and answers of each class.
        self.per_class = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
        # Loss in units, top-5 hits, losses that are not finite.
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: ``logits`` (B, C) float32, ``targets`` (B,) int64."""
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        finite = torch.isfinite(losses)
        self.sums[0] += (torch.where(finite, losses, 0.0) / LOSS_UNIT).round().long().sum()
        self.sums[2] += (~finite).sum()
        answers, ones = logits.argmax(1), torch.ones_like(targets)
        self.per_class[0].index_add_(0, targets, (answers == targets).long())
        self.per_class[1].index_add_(0, targets, ones)
        self.per_class[2].index_add_(0, answers, ones)
        if self.num_classes >= 5:
            self.sums[1] += (logits.topk(5).indices == targets[:, None]).sum()

    def add_up(self) -> None:
        """Sum over all processes."""
        all_reduce_sum(self.per_class)
        all_reduce_sum(self.sums)

    def result(self) -> Evaluation:
        loss_units, top5, bad = self.sums.tolist()
        right, count, _ = self.per_class.sum(1).tolist()
        return Evaluation(
            loss=float("nan") if bad or not count else loss_units * LOSS_UNIT / count,
            acc1=100.0 * right / max(count, 1),
            acc5=100.0 * top5 / max(count, 1) if self.num_classes >= 5 else None,
            count=count,
            correct_per_class=self.per_class[0].cpu(),
            count_per_class=self.per_class[1].cpu(),
            predicted_per_class=self.per_class[2].cpu(),
        )


@dataclass(frozen=True)
class RealAccuracy:
    """Exact accuracy by several right classes per image, of all processes together."""

    acc1: float
    """%, the answer is among the right ones."""
    acc5: float | None
    """%, one of the first five answers is; None below five classes."""
    count: int
    """Images that have a right class; the others are not counted."""


class RealCounts:
    """Integer counts by several right classes per image ("Are we done with ImageNet?", Beyer et al.
    2020, arXiv:2006.07159, section 4), on the device.

    Args:
        labels: (N, L) int64, of each image of the data set, ``PADDING`` behind the last one.
        num_classes: C.
        device: where the logits are.
    """

    def __init__(self, labels: Tensor, num_classes: int, device: torch.device) -> None:
        self.labels = labels.to(device)
        self.num_classes = num_classes
        # Images with a right class, top-1 and top-5 hits.
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, indices: Tensor) -> None:
        """Count a batch: ``logits`` (B, C), ``indices`` (B,) int64 of the images in the set."""
        right = self.labels[indices]  # (B, L)
        self.sums[0] += (right != PADDING).any(1).sum()
        self.sums[1] += (right == logits.argmax(1)[:, None]).any(1).sum()
        if self.num_classes >= 5:
            answers = logits.topk(5).indices[:, :, None]  # (B, 5, 1)
            self.sums[2] += (right[:, None] == answers).flatten(1).any(1).sum()

    def add_up(self) -> None:
        """Sum over all processes."""
        all_reduce_sum(self.sums)

    def result(self) -> RealAccuracy:
        count, top1, top5 = self.sums.tolist()
        acc5 = 100.0 * top5 / max(count, 1) if self.num_classes >= 5 else None
        return RealAccuracy(100.0 * top1 / max(count, 1), acc5, count)
