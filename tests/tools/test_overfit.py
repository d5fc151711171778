"""tools.overfit: sound models learn, and what is broken is named, on real digits."""

import re
from pathlib import Path

import pytest
from before_training import SMALL

from tools import overfit

PLUGIN = """
import itertools
import numpy as np
from datasets import ArraySource, register_dataset


class Changing(ArraySource):
    turn = itertools.count()

    def read(self, index):
        return self.images[index], next(self.turn) % 3


def source(images, targets, kind=ArraySource):
    return kind(images, targets, ["a", "b", "c"], "made")


@register_dataset("constant")
def constant(is_train, options, seed):
    return source(np.full((24, 16, 16), 100, np.uint8), np.arange(24) % 3)


@register_dataset("changing")
def changing(is_train, options, seed):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16)).astype(np.uint8)
    return source(images, np.arange(24) % 3, Changing)


@register_dataset("torn")
def torn(is_train, options, seed):
    images = np.random.default_rng(0).integers(0, 255, (12, 16, 16)).astype(np.uint8)
    return source(np.concatenate([images, images]), np.arange(24) // 12)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "made_for_tools.py"
    path.write_text(PLUGIN)
    return path


def overfitted(capsys, *argv: str) -> tuple[int, str]:
    code = overfit.main([*SMALL, "--batch-size", "8", "--most-updates", "60", *argv])
    return code, capsys.readouterr().out


def test_a_sound_model_learns_by_heart(capsys):
    code, said = overfitted(capsys, "--drop-path", "0", "--smoothing", "0.1")
    assert code == 0 and "fine: " in said and said.startswith("8 images")


def test_a_rate_too_low_is_shown_by_a_higher_one(capsys):
    code, said = overfitted(capsys, "--lr", "1e-6")
    assert code == 1
    found = re.search(r"broken: learning rate too low\. With lr: (\S+) alone the loss", said)
    assert found and float(found[1]) > 1e-6
    assert "too high" not in said and "broken: input" not in said


def test_a_frozen_model_is_shown_by_a_free_one(capsys):
    freeze = ("--freeze", "*", "--unfreeze-at", "0:*.bias")
    code, said = overfitted(capsys, "--lr", "1e-3", *freeze)
    assert code == 1 and "broken: frozen model. With freeze: none" in said


def test_a_loss_that_teaches_nothing_is_shown_by_another(capsys):
    code, said = overfitted(capsys, "--loss", "focal", "--focal-gamma", "60")
    assert code == 1 and "broken: loss. With loss: ce" in said


@pytest.mark.parametrize(
    "name, words",
    (
        ("constant", "input: all 8 images are the same after preprocessing"),
        ("changing", "labels: 8 of 8 images have another label each time they are read (made#"),
        ("torn", "images are there under more than one label"),
    ),
)
def test_broken_data_is_named_with_evidence(plugin, capsys, name, words):
    argv = ("--data-set", name, "--plugin", str(plugin))
    if name == "torn":
        argv += ("--overfit-batches", "3")
    code, said = overfitted(capsys, *argv, "--most-updates", "25")
    assert code == 1 and "broken: " in said and words in said
    # Nothing else is tried where the data is to blame.
    assert said.count("broken") == 1 and "learning rate" not in said
