"""architectures/sizes.py: one number for a square, else height and width."""

import pytest

from architectures.sizes import height_width, shortest, size_text


@pytest.mark.parametrize(
    ("size", "both", "saved", "text"),
    [
        (224, (224, 224), 224, "224"),
        ((224, 224), (224, 224), 224, "224"),
        ([192, 256], (192, 256), (192, 256), "192×256"),  # height first
    ],
)
def test_a_square_is_one_number_and_height_comes_first(size, both, saved, text):
    assert height_width(size) == both
    assert shortest(size) == saved
    assert size_text(size) == text


@pytest.mark.parametrize("size", [(1,), (1, 2, 3), ()])
def test_other_than_two_sides_are_refused(size):
    with pytest.raises(ValueError):
        height_width(size)
