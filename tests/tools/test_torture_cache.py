"""A mistreated disk cache: what ``python -m tools.torture cache`` does, at a small size."""

import random

import pytest

from tools.torture.cache import FORMS, Result, Subject, flips, kills, main


@pytest.fixture(scope="module", params=FORMS)
def subject(request, tmp_path_factory):
    return Subject(tmp_path_factory.mktemp("cache"), FORMS[request.param])


def test_no_pixel_is_wrong(subject):
    killed, damaged = Result("kills"), Result("damage")
    kills(subject, random.Random(1), 2, killed)
    flips(subject, random.Random(1), 8, damaged)
    assert (killed.rounds, killed.wrong, damaged.wrong) == (2, 0, 0)
    assert damaged.compared == 8 * 2 * len(subject.want) and damaged.noticed >= 6


def test_pixels_that_nobody_checked_are_counted(subject, monkeypatch):
    monkeypatch.setattr("pipeline.image_file.digest", lambda pixels: 0)
    result = Result("damage")
    flips(subject, random.Random(1), 12, result)
    assert result.wrong > 5


def test_the_command_says_what_it_found(capsys):
    assert main(["--number", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count(" | 1 | 48 |") >= 2 and " images compared, 0 wrong" in said
