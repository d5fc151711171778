"""pipeline/sources/digits.py: the digits of scikit-learn."""

import numpy as np
import pytest
import torch
from tiny_sets import open_set


def test_digits_split_is_the_same_for_every_seed():
    train, val = (open_set("DIGITS", "", t, seed=t) for t in (True, False))
    again = open_set("digits", "", False, seed=99)
    assert (len(train), len(val), train.classes[7]) == (1438, 359, "7")
    assert torch.equal(val[0].image, again[0].image)
    assert np.array_equal(val.targets, again.targets)
    images = train.source.source.images
    assert images.shape == (1797, 8, 8) and images.max() == 255
    counts = np.bincount(val.targets)
    assert counts.min() >= 35 and counts.max() <= 37
    assert len(open_set("DIGITS", "", False, val_fraction=0.5)) == pytest.approx(898, abs=5)
