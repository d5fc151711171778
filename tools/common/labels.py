"""Which labels a multi-label model finds on an image: those whose probability reaches their
threshold."""

import numpy as np

from checkpointing.files import MULTILABEL
from errors import OptionError
from inference import Classifier

THRESHOLD = 0.5  # where validation has chosen none


def is_multilabel(classifier: Classifier) -> bool:
    """Whether an image may have any number of the classes."""
    return classifier.task == MULTILABEL


def thresholds_of(classifier: Classifier) -> np.ndarray:
    """Of each class, (C,) float64."""
    count = len(classifier.class_names)
    return np.array(classifier.thresholds or [THRESHOLD] * count, dtype=np.float64)


def found(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Numbers of the labels that are there, the likeliest first, from (C,) probabilities."""
    there = np.flatnonzero(probabilities >= thresholds)
    return there[likeliest_first(probabilities[there])]


def likeliest_first(probabilities: np.ndarray, most: int | None = None) -> np.ndarray:
    """Numbers of all classes, or of the ``most`` likeliest; of equal ones the first comes first."""
    if most is None or most >= len(probabilities):
        return (-probabilities).argsort(kind="stable")
    # To sort them all takes a millisecond for ImageNet-22k.
    last = np.partition(probabilities, -most)[-most]
    likely = np.flatnonzero(~(probabilities < last))  # what isn't a number is there too
    return likely[(-probabilities[likely]).argsort(kind="stable")][:most]


def with_threshold(classifier: Classifier, threshold: float | None) -> np.ndarray:
    """:func:`thresholds_of`, or ``--threshold`` for each class.

    Raises OptionError where it can't be one, or the model has classes that exclude each other.
    """
    if threshold is None:
        return thresholds_of(classifier)
    if not is_multilabel(classifier):
        raise OptionError("threshold", "is for models of --task multilabel: see --topk")
    if not 0 <= threshold <= 1:
        raise OptionError("threshold", f"{threshold:g} is not in 0 to 1")
    return np.full(len(classifier.class_names), threshold)
