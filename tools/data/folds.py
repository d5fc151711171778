"""Dealing images out to parts or folds: each class alike, and never a group to two of them."""

from collections.abc import Sequence

import numpy as np

from pipeline.sources.stratified import deal_labels


def deal_images(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each image, (N,) int64: of a class, as of all images, the folds' counts differ by one
    at most. ``labels`` are (N,) integers; or (N, K) of 0 and 1, by ``deal_labels``."""
    if labels.ndim == 2:
        return deal_labels(labels.astype(np.int64), np.ones(len(labels)), [1 / folds] * folds, seed)
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
        labels: (N,) integers from 0; or (N, K) of 0 and 1, which ``deal_labels`` shares out.
        shares: of the parts, above 0, 1 in all; no more parts than groups.
        seed: decides between groups that are alike.
    """
    if labels.ndim == 2:
        part_of = _deal_labelled(groups, labels, shares, seed)
        return part_of[groups]
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


def _deal_labelled(
    groups: np.ndarray, labels: np.ndarray, shares: Sequence[float], seed: int
) -> np.ndarray:
    """Part of each group of images with any number of labels."""
    sizes = np.bincount(groups)
    counts = np.zeros((len(sizes), labels.shape[1]), dtype=np.int64)
    np.add.at(counts, groups, labels)
    part_of = deal_labels(counts, sizes, shares, seed)
    _fill_empty(part_of, sizes, len(shares))
    return part_of


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
    (N,) bool, ``groups`` are (N,) integers from 0; so are ``labels``, or they are (N, K) of 0 and
    1.
    """
    held_out, moved = held_out.copy(), 0
    sizes = np.bincount(groups)
    for label in np.setdiff1d(classes_of(labels), classes_of(labels[~held_out])):
        has = labels == label if labels.ndim == 1 else labels[:, label] > 0
        if has[~held_out].any():
            continue  # came with the group of another class
        candidates = np.unique(groups[has])
        of_group = groups == candidates[sizes[candidates].argmin()]
        moved += int((of_group & held_out).sum())
        held_out &= ~of_group
    return held_out, moved


def classes_of(labels: np.ndarray) -> np.ndarray:
    """The numbers of the classes that images of these labels, (N,) or (N, K), have."""
    return np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(0))
