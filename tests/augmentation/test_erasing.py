"""augmentation/erasing.py, against timm."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pixels import LEVEL, PLAIN, PREPROCESSING, SAMPLES, augment
from scipy import stats
from timm.data.random_erasing import RandomErasing

from augmentation.batch import BatchAugment, Normalise
from augmentation.preprocessing import Preprocessing
from utils import seed_all


@pytest.mark.parametrize("count", [1, 3])
def test_erasing_draws_from_timms_distribution(count):
    theirs = RandomErasing(0.4, mode="const", max_count=count, device="cpu")
    seed_all(0)
    expected = [1 - float(theirs(torch.ones(1, 32, 32)).mean()) for _ in range(SAMPLES)]
    options = replace(PLAIN, reprob=0.4, recount=count, remode="const")
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)
    ours = BatchAugment(preprocessing, options, 0)
    ones = torch.full((SAMPLES, 3, 32, 32), 255, dtype=torch.uint8)
    found = (1 - ours(ones, ours.plan(0, np.arange(SAMPLES)))[:, 0].mean((1, 2))).tolist()
    erased = [sum(x > 0 for x in side) for side in (expected, found)]
    assert stats.chi2_contingency([erased, [SAMPLES - e for e in erased]]).pvalue > LEVEL
    assert stats.ks_2samp([x for x in expected if x], [x for x in found if x]).pvalue > LEVEL


def test_erased_boxes_hold_normal_noise_of_their_own():
    options = replace(PLAIN, reprob=1.0)
    grey = torch.full((40, 3, 64, 64), 128, dtype=torch.uint8)
    ours = augment(options)
    plain = Normalise(PREPROCESSING)(grey)
    result = ours(grey, ours.plan(0, np.arange(40)))
    noise = result[result != plain]
    assert stats.kstest(noise[:20000].numpy(), "norm").pvalue > LEVEL
    # Where two boxes overlap, each has noise of its own.
    both = (result[:-1] != plain[:-1]) & (result[1:] != plain[1:])
    assert both.sum() > 1000
    assert (result[:-1] != result[1:])[both].float().mean() > 0.99
    rand = augment(replace(options, remode="rand"))
    result = rand(grey, rand.plan(0, np.arange(40)))
    changed = [set(r[0][r[0] != p[0]].tolist()) for r, p in zip(result, plain, strict=True)]
    assert all(len(values) == 1 for values in changed)


def test_resplit_spares_the_first_copy():
    ours = augment(replace(PLAIN, reprob=1.0, resplit=True))
    erased = ours.plan(0, np.arange(300)).boxes[:, 0, 1] > 0
    assert not erased[::3].any()
    assert erased[1::3].mean() > 0.95
