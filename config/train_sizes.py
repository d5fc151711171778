"""``--train-sizes``: the sizes of training images by epoch."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from errors import OptionError, shown

if TYPE_CHECKING:
    from config.options import ModelOptions

_STAGE = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?:([0-9]{1,9})")


class Stage(NamedTuple):
    """From when on images have what size."""

    epoch: int
    """Epochs that are done by then."""
    size: tuple[int, int]
    """Height and width in pixels."""


def stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    """The stages of "SIZE:EPOCH" or "HEIGHTxWIDTH:EPOCH", in their order.

    Raises OptionError for another text, and unless the first stage begins at 0 and each later than
    the one before.
    """
    found: list[Stage] = []
    for text in texts:
        match = _STAGE.fullmatch(text)
        if match is None or not int(match[1]) or not int(match[2] or 1):
            raise OptionError(
                "train_sizes", f"{shown(text)} is not SIZE:EPOCH, e.g. 128:0 160:30, or 128x96:0"
            )
        found.append(Stage(int(match[3]), (int(match[1]), int(match[2] or match[1]))))
    epochs = [stage.epoch for stage in found]
    if found and epochs[0] != 0:
        raise OptionError("train_sizes", "says nothing of the first epoch: begin with SIZE:0")
    if any(after <= before for before, after in zip(epochs, epochs[1:], strict=False)):
        raise OptionError("train_sizes", "each size must begin later than the one before")
    return tuple(found)


def train_size(model: "ModelOptions", epoch: int) -> tuple[int, int]:
    """Height and width of training images once ``epoch`` epochs are done."""
    begun = [stage.size for stage in stages(model.train_sizes) if stage.epoch <= epoch]
    return begun[-1] if begun else model.size
