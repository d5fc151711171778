"""DIGITS: scikit-learn's handwritten digits."""

from typing import TYPE_CHECKING

import numpy as np

from errors import OptionError
from pipeline.sources.base import ArraySource, Source, held_out

if TYPE_CHECKING:
    from config import DataOptions


def digits(is_train: bool, data: "DataOptions", seed: int) -> Source:
    """scikit-learn's 1797 handwritten digits, 8×8; the split is the same for every seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise OptionError(
            "data_set", "DIGITS needs scikit-learn: pip install scikit-learn"
        ) from None
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    source = ArraySource(images, digits.target, [str(d) for d in digits.target_names], "DIGITS")
    return held_out(source, is_train, data.val_fraction or 0.2, seed=0)
