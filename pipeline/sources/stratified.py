"""Which images are held out for validation, so that each label has its share."""

from collections.abc import Sequence

import numpy as np


def iterative_split(
    targets: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation, each sorted, with each label's share in both.

    Iterative stratification (Sechidis et al. 2011, algorithm 1): the label that the fewest of the
    remaining images have comes first, and its images go where most of that label is still wanted.
    A label of two or more images wants at least one on either side, one of a single image wants it
    in training. Images without a label are shared out last.

    Args:
        targets: (N, K), not zero where an image has a label.
        fraction: of the images that are held out, in (0, 1).
        seed: decides between images that fit alike.
    """
    has = targets != 0
    rng = np.random.RandomState(seed % 2**32)  # its stream, unlike Generator's, is fixed for good
    count = len(has)
    per_label = has.sum(0)
    out = np.clip(np.maximum(1, np.round(per_label * fraction)), 0, np.maximum(per_label - 1, 0))
    wanted = np.stack([per_label - out, out]).astype(np.float64)  # (2, K): training, validation
    total = min(max(1, round(count * fraction)), count - 1)
    room = np.array([count - total, total], dtype=np.float64)
    side = np.full(count, -1)
    order = rng.permutation(count)
    left = per_label.copy()
    while left.any():
        label = np.where(left > 0, left, count + 1).argmin()
        for index in order[(side[order] < 0) & has[order, label]]:
            here = wanted[:, label]
            part = int(room[1] > room[0]) if here[0] == here[1] else int(here[1] > here[0])
            side[index] = part
            wanted[part, has[index]] -= 1
            room[part] -= 1
            left[has[index]] -= 1
    rest = order[side[order] < 0]
    outside = min(len(rest), max(0, int(room[1])))
    side[rest] = 0
    side[rest[:outside]] = 1
    return np.flatnonzero(side == 0), np.flatnonzero(side == 1)


def deal_labels(
    counts: np.ndarray, sizes: np.ndarray, shares: Sequence[float], seed: int
) -> np.ndarray:
    """Part of each unit, (U,) int64, so that each part has its share of every label.

    Iterative stratification (Sechidis et al. 2011, algorithm 1) of images, or of groups of images
    that stay whole: the label of the fewest remaining images comes first, and of its units the one
    with most of it; each goes where most of that label is wanted, of several such parts where most
    images are.

    Args:
        counts: (U, K) images of a unit that have a label.
        sizes: (U,) images of a unit.
        shares: of the parts, 1 in all.
        seed: decides between units that fit alike.
    """
    share = np.asarray(shares, dtype=np.float64)
    wanted, room = np.outer(share, counts.sum(0)), share * sizes.sum()
    part = np.full(len(counts), -1)
    order = np.random.RandomState(seed % 2**32).permutation(len(counts))

    def deal(unit: int, first: np.ndarray) -> None:
        best = np.flatnonzero(np.isclose(first, first.max()))
        part[unit] = best[room[best].argmax()]
        wanted[part[unit]] -= counts[unit]
        room[part[unit]] -= sizes[unit]

    left = counts.sum(0)
    while left.any():
        label = np.where(left > 0, left, left.sum() + 1).argmin()
        units = order[(part[order] < 0) & (counts[order, label] > 0)]
        for unit in units[np.argsort(-counts[units, label], kind="stable")]:
            deal(unit, wanted[:, label])
            left = left - counts[unit]
    rest = order[part[order] < 0]
    for unit in rest[np.argsort(-sizes[rest], kind="stable")]:
        deal(unit, room)
    return part
