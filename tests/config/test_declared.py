"""An option's record, and how it is found by its name."""

from dataclasses import dataclass
from typing import Literal

import pytest

from config import all_options, by_name, is_option, nearest_option, option, section_options


@pytest.mark.parametrize("name", ["batch_size", "batch-size", "Batch-Size", "BATCH_SIZE"])
def test_hyphens_underscores_and_case_do_not_matter(name):
    assert is_option(name) and by_name(name).name == "batch_size"


def test_aliases_are_names_too():
    assert by_name("monitor") is by_name("best_metric")
    assert by_name("three_augment") is by_name("ThreeAugment")


def test_unknown_names():
    assert not is_option("batchsize") and not is_option("")
    with pytest.raises(KeyError):
        by_name("batchsize")


def test_nearest_option():
    assert nearest_option("warmup_epocs") == "did you mean --warmup-epochs?"
    assert nearest_option("threeaugmen") == "did you mean --ThreeAugment?"
    assert nearest_option("qqqq") == "--help lists them all"


@dataclass(frozen=True)
class Section:
    """Title of the section"""

    some_words: tuple[str, ...] = option((), "help of words", aliases=("words",))
    share: float | None = option(None, "help of share", above=0, high=1)
    count: int | Literal["auto"] = option("auto", "help of count", low=1, transient=True)
    kind: Literal["a", "b"] = option("a", "help of kind")
    pair: tuple[float, ...] = option((0.75, 4 / 3), "help of pair", length=(2, 2))


def test_records_of_a_section():
    words, share, count, kind, pair = section_options(Section, "some")
    assert {opt.section for opt in (words, share, count, kind, pair)} == {"some"}
    assert {opt.title for opt in (words, share, count, kind, pair)} == {"Title of the section"}
    assert words.flag == "--some-words" and words.aliases == ("words",)
    assert words.help == "help of words" and words.default == ()
    assert share.bounds == {"low": None, "above": 0, "high": 1, "below": None, "length": None}
    assert count.transient and not kind.transient
    assert pair.bounds["length"] == (2, 2)


def test_types_and_defaults_as_they_are_shown():
    shown = [(opt.type_name, opt.default_text) for opt in section_options(Section, "some")]
    assert shown == [
        ("str …", ""),
        ("float|none", "none"),
        ("int|auto", "auto"),
        ("a|b", "a"),
        ("float …", "0.75 1.3333"),
    ]


def test_all_options_are_in_sections_without_gaps():
    sections = [opt.section for opt in all_options()]
    changes = sum(a != b for a, b in zip(sections, sections[1:], strict=False))
    assert changes == len(set(sections)) - 1
