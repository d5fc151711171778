"""Dealing images out to parts or folds: each class alike, and never a group to two of them."""

from collections.abc import Sequence

import numpy as np


def deal_images(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each image, (N,) int64: of a class, as of all images, the folds' counts differ by one
    at most. ``labels`` are (N,) integers."""
    mixed = np.random.RandomState(seed).permutation(len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[by_class] = np.arange(len(labels)) % folds
    return fold


def deal_groups(
    groups: np.ndarray, labels: np.ndarray, shares: Sequence[float], seed: int
) -> np.ndarray:
    """Part of each image, (N,) int64, so that a group is in one part and classes are spread.

    Groups come one after another, those with the greatest shares of classes first, to the part
    where they add least to Σ_p Σ_c (y_pc - s_p n_c)² / (s_p n_c²): y_pc are the images of class c
    in part p, n_c those of all, s_p the part's share. All images together count as one class more.

    Args:
        groups: (N,) integers from 0, the group of each image.
        labels: (N,) integers from 0.
        shares: of the parts, above 0, 1 in all; no more parts than groups.
        seed: decides between groups that are alike.
    """
    share = np.asarray(shares)[:, None]
    classes, counts, starts = _contents(groups, labels)
    totals = np.bincount(classes, weights=counts)
    weights = counts / totals[classes] ** 2
    greatness = np.add.reduceat(weights * counts, starts[:-1])
    held = np.zeros((len(shares), len(totals)))
    part_of = np.empty(len(starts) - 1, dtype=np.int64)
    mixed = np.random.RandomState(seed).permutation(len(part_of))
    for group in mixed[np.argsort(-greatness[mixed], kind="stable")]:
        here = slice(starts[group], starts[group + 1])
        inside, number = classes[here], counts[here]
        lack = held[:, inside] - share * totals[inside]
        added = ((2 * lack + number) * weights[here]).sum(1) / share[:, 0]
        part = int(added.argmin())
        part_of[group] = part
        held[part, inside] += number
    _fill_empty(part_of, np.bincount(groups), len(shares))
    return part_of[groups]


def _contents(groups: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes and counts of the groups one after another, and where each group begins.

    Class C, one above the last label, stands for all images of a group.
    """
    width = int(labels.max()) + 2
    keys = np.concatenate([groups * width + labels, groups * width + width - 1])
    keys, counts = np.unique(keys, return_counts=True)
    starts = np.searchsorted(keys, np.arange(groups.max() + 2) * width)
    return keys % width, counts.astype(np.float64), starts


def _fill_empty(part_of: np.ndarray, sizes: np.ndarray, parts: int) -> None:
    """Give each part without a group the smallest one of the part that has most."""
    for part in range(parts):
        if not (part_of == part).any():
            richest = np.bincount(part_of, minlength=parts).argmax()
            candidates = np.flatnonzero(part_of == richest)
            part_of[candidates[sizes[candidates].argmin()]] = part


def keep_classes(
    held_out: np.ndarray, groups: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, int]:
    """What is held out, changed so that training has every class, and how many images that took.

    Of a class without training images the smallest group goes over to training. ``held_out`` is
    (N,) bool, the others are (N,) integers from 0.
    """
    held_out, moved = held_out.copy(), 0
    sizes = np.bincount(groups)
    for label in np.setdiff1d(labels, labels[~held_out]):
        if (labels[~held_out] == label).any():
            continue  # came with the group of another class
        candidates = np.unique(groups[labels == label])
        of_group = groups == candidates[sizes[candidates].argmin()]
        moved += int((of_group & held_out).sum())
        held_out &= ~of_group
    return held_out, moved
