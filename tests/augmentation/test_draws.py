"""augmentation/draws.py: numbers that are a function of seed and position."""

import numpy as np
import pytest
from pixels import LEVEL
from scipy import stats

from augmentation.draws import Draws, Numbers, uniforms


def test_numbers_depend_on_seed_and_position_alone():
    together = uniforms(7, np.arange(100), 8)
    assert np.array_equal(together[41:43], uniforms(7, np.array([41, 42]), 8))
    assert not np.array_equal(together, uniforms(8, np.arange(100), 8))
    many = uniforms(3, np.arange(4000), 10)
    assert stats.kstest(many.ravel(), "uniform").pvalue > LEVEL
    # Neighbours in either direction are not alike.
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.05
    assert abs(np.corrcoef(many[:, 0], many[:, 1])[0, 1]) < 0.05


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**64 - 1])
def test_numbers_of_one_image_are_those_of_its_row(seed):
    for position in (0, 1, 1_281_166, 2**40):
        row = uniforms(seed, np.array([position]), 12)[0]
        numbers = Numbers(seed, np.int64(position))
        assert [numbers[place] for place in range(12)] == row.tolist()
        assert [numbers.after(3)[place] for place in range(9)] == row[3:].tolist()


def test_numbers_are_handed_out_once():
    draws = Draws(1, 2, np.arange(5), 6)
    first, second = draws.uniform(2), draws.uniform(2, 2)
    assert first.shape == (5, 2) and second.shape == (5, 2, 2)
    assert not np.isin(first, second).any()
    with pytest.raises(ValueError, match="more than 6 numbers"):
        draws.uniform()
    # Another purpose, other numbers.
    assert not np.isin(first, Draws(1, 3, np.arange(5), 6).uniform(6)).any()


def test_other_distributions():
    draws = Draws(4, 0, np.arange(20_000), 6)
    assert stats.kstest(draws.normal(), "norm").pvalue > LEVEL
    signs = draws.sign()
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 0.03
    whole = draws.below(np.full((20_000, 1), 7))[:, 0]
    assert stats.chisquare(np.bincount(whole)).pvalue > LEVEL and set(whole) == set(range(7))
