"""Whether both parts of a data set show the same classes, of whatever kind the set is."""

from collections.abc import Sequence

import numpy as np

from errors import DataError, did_you_mean, first_names, shown
from pipeline.sources.base import Source


def missing_classes(source: Source) -> list[str]:
    """What is said of a validation part without images of some classes, a sentence or none.

    Nothing is known where labels are only read with their images.
    """
    if source.targets is None:
        return []
    empty = np.flatnonzero(_images_per_class(source, len(source.classes)) == 0)
    if not len(empty):
        return []
    names = [source.classes[label] for label in empty]
    return [f"the validation part has no images of {len(names)} classes: {first_names(names)}"]


def check_same_classes(name: str, train: Source, val: Source) -> None:
    """Raise DataError if the validation part has classes that the training part lacks.

    Compared are the lists of classes, and where labels are known the images of each class. ``name``
    is that of the data set, for the message.
    """
    _compare_lists(name, list(train.classes), list(val.classes))
    several = any(s.targets is not None and s.targets.ndim > 1 for s in (train, val))
    if train.targets is None or val.targets is None or several:
        # An image with several labels, or none, teaches something of each.
        return
    if names := _unseen(train, val):
        raise DataError(
            f"{name}: the training part has no images of {len(names)} classes that the validation "
            f"part has ({first_names(names)}): add some, or leave those of the validation part out"
        )


def unlearnt_labels(train: Source, val: Source) -> list[str]:
    """What is said of labels that images of the validation part alone have, a sentence or none."""
    if train.targets is None or train.targets.ndim == 1 or not (names := _unseen(train, val)):
        return []
    return [
        f"the training part has no images of {len(names)} classes that the validation part has "
        f"({first_names(names)}): they are measured, and can't be learnt"
    ]


def _unseen(train: Source, val: Source) -> list[str]:
    """The classes of which the validation part has images and the training part none."""
    count = len(train.classes)
    seen, asked = (_images_per_class(source, count) for source in (train, val))
    return [
        train.classes[label] for label in np.flatnonzero((seen[: len(asked)] == 0) & (asked > 0))
    ]


def _compare_lists(name: str, train: Sequence[str], val: Sequence[str]) -> None:
    if val == train[: len(val)]:  # a part that numbers its classes may lack the last ones
        return
    known = set(train)
    for other in val:
        if other not in known:
            hint = did_you_mean(other, train)
            raise DataError(
                f"{name}: no class {shown(other)} in the training part, the validation part has it"
                + (hint and f"; {hint}")
            )
    place = next(i for i, (a, b) in enumerate(zip(train, val, strict=False)) if a != b)
    raise DataError(
        f"{name}: class {place} is {shown(train[place])} in the training part and "
        f"{shown(val[place])} in the validation part: give both the same list of classes"
    )


def _images_per_class(source: Source, count: int) -> np.ndarray:
    if source.targets.ndim > 1:
        return (source.targets > 0).sum(0)
    return np.bincount(source.targets, minlength=count)
