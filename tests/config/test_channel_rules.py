"""Options of images that aren't three colours of 8 bits."""

import pytest

from config import load
from errors import OptionError


def test_colours_are_left_alone_where_there_are_none():
    config = load(["--in-chans", "5"])
    assert (config.augment.aa, config.augment.color_jitter) == (None, None)
    assert config.origin["aa"] == "--in-chans"
    assert load(["--in-chans", "1"]).augment == load([]).augment
    assert load(["--bit-depth", "16"]).augment.aa is None


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        ("--in-chans 5 --aa v0", "aa"),
        ("--in-chans 5 --color-jitter 0.2", "color_jitter"),
        ("--in-chans 2 --ThreeAugment", "ThreeAugment"),
        ("--in-chans 4 --grayscale-prob 0.1", "grayscale_prob"),
        ("--in-chans 1 --grayscale-prob 0.1", "grayscale_prob"),
        ("--in-chans 1 --aa none --color-jitter 0.1 0.1 0.1 0.1", "color_jitter"),
        ("--bit-depth 16 --color-jitter 0.2", "color_jitter"),
        ("--bit-depth 12", "bit_depth"),
        ("--in-chans 4 --augment-on cpu --aa trivial", "augment_on"),
        ("--in-chans 1 --aa augmix-m5", "augment_on"),
        ("--in-chans 4 --mean 0.5 0.5 0.5", "mean"),
        ("--std 0.5 0.5", "std"),
    ],
)
def test_what_needs_colours_is_refused(argv, option):
    with pytest.raises(OptionError) as caught:
        load(argv.split())
    assert caught.value.option == option


def test_a_value_for_each_channel():
    config = load(
        [
            "--in-chans",
            "4",
            "--mean",
            "0.1",
            "0.2",
            "0.3",
            "0.4",
            "--std",
            "0.5",
            "--rotate",
            "5",
            "--blur-prob",
            "0.1",
            "--bit-depth",
            "16",
            "--augment-on",
            "cpu",
        ]
    )
    assert config.data.mean == (0.1, 0.2, 0.3, 0.4)
