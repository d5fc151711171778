"""config/background.py: the colour under transparent images."""

import pytest

from config.background import background_colour
from errors import OptionError


@pytest.mark.parametrize(
    ("text", "colour"),
    [("white", (255, 255, 255)), ("#0a0B0c", (10, 11, 12)), ("drop", None), ("navy", (0, 0, 128))],
)
def test_names_and_hexadecimal_numbers_are_colours(text, colour):
    assert background_colour(text) == colour


@pytest.mark.parametrize("text", ["", "whit", "#12345", "#11223344", "255"])
def test_what_is_no_opaque_colour_is_refused(text):
    with pytest.raises(OptionError, match="--background: .* is no colour"):
        background_colour(text)
