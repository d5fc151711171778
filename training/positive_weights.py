"""The factor of the loss where a label is there: ``--pos-weight``."""

import logging

import torch
from torch import Tensor

from config.multilabel import positive_number
from errors import OptionError
from pipeline.dataset import ImageDataset
from training.class_weights import read_class_weights

log = logging.getLogger(__name__)

_OPTION = "pos_weight"


def positive_weights(text: str, dataset: ImageDataset) -> Tensor | None:
    """The factors that ``--pos-weight`` means for the classes of a training part, (K,) float32.

    None for "none" and without one. "balanced" is negatives / positives of each class, so that both
    weigh alike; 1 for a class without positives. Raises OptionError for a file that can't be used.
    """
    if text in ("", "none"):
        return None
    names = list(dataset.classes)
    number = positive_number(text)
    if number is not None:
        return torch.full((len(names),), number)
    if text == "balanced":
        positives = torch.from_numpy(dataset.targets.sum(0, dtype="int64")).double()
        ratio = (len(dataset) - positives) / positives.clamp(min=1)
        # A label of every image has no negatives, and a factor of zero would forget it.
        ratio = ratio.clamp(min=1 / max(len(dataset), 1))
        return torch.where(positives > 0, ratio, 1.0).float()
    try:
        given = read_class_weights(text, names)
    except OptionError as error:
        hint = "" if "exist" not in error.message else ", or say balanced or a number"
        raise OptionError(_OPTION, f"{error.message}{hint}") from None
    return torch.tensor([given.get(name, 1.0) for name in names])


def announce_positive_weights(weights: Tensor | None) -> None:
    """Say the least and the greatest of the weights."""
    if weights is not None:
        log.info("weights  of labels that are there: %.3g to %.3g", weights.min(), weights.max())
