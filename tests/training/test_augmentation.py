"""Runs with transforms of one's own, augmentation splits and mixing that ends."""

import pytest
from runs import STOPPED, assert_same_state, logged, newest, stopped_after, train
from torch import nn

PLUGIN = """
import random
import numpy as np
import torch
from PIL import ImageOps
from datasets import register_transform

@register_transform("spotted")
def spotted(image):
    image = image.copy()
    for _ in range(np.random.randint(1, 4)):
        place = random.randrange(image.width), int(torch.randint(image.height, (1,)))
        image.putpixel(place, (255, 0, 0))
    return image

@register_transform("shrinks")
def shrinks(image):
    return image.resize((3, 3))
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> tuple[str, ...]:
    """The options of both kinds of transforms of one's own."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    library = pytest.importorskip("albumentations")
    plugin, pipeline = tmp_path / "own_transforms.py", tmp_path / "pipeline.yaml"
    plugin.write_text(PLUGIN)
    steps = [library.GaussNoise(p=0.5), library.RandomBrightnessContrast(p=0.5)]
    library.save(library.Compose(steps), pipeline, data_format="yaml")
    return "--plugin", str(plugin), "--transform", "spotted", "--albumentations", str(pipeline)


SPLITS = ("--aug-splits", "3", "--jsd-loss", "--mixup", "0", "--cutmix", "0", "--resplit")
MANY = ("--rotate", "20", "--perspective", "0.3", "--grayscale-prob", "0.3", "--blur-prob", "0.3")
MANY += ("--aa", "none", "--color-jitter", "0.4", "0.4", "0.4", "0.1")
MANY += ("--color-jitter-prob", "0.7", "--mixup-off-epoch", "1")


@pytest.mark.parametrize("kind", ["splits", "many", "own"])
def test_resume_in_mid_epoch_is_exact(images, tmp_path, own, kind):
    """With another number of workers too."""
    one_by_one = (*SPLITS, "--aa", "augmix-m5-w2-d2", *own)
    options = {"splits": SPLITS, "many": MANY, "own": one_by_one}[kind]
    options = (*options, "--epochs", "2")
    assert train(images, tmp_path / "whole", *options) == 0
    with stopped_after(9):
        assert train(images, tmp_path / "parts", *options, "--num-workers", "1") == STOPPED
    assert train(images, tmp_path / "parts", *options, "--resume", "auto") == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_mixing_ends_where_it_is_to_end(images, tmp_path):
    """As of a run that goes on without mixing from there."""
    options = ("--epochs", "2", "--no-repeated-aug")
    assert train(images, tmp_path / "one", *options, "--mixup-off-epoch", "1") == 0
    assert train(images, tmp_path / "two", *options, "--stop-at-epoch", "1") == 0
    rest = ("--resume", "auto", "--mixup", "0", "--cutmix", "0")
    assert train(images, tmp_path / "two", *options, *rest) == 0
    assert_same_state(newest(tmp_path / "one"), newest(tmp_path / "two"))


def test_splits_come_one_after_the_other(images, tmp_path, monkeypatch):
    """The model gets three times the batch, the loss as many labels; answers are of the clean."""
    seen = []

    class Loss(nn.Module):
        copies = 1

        def forward(self, images, outputs, targets):
            seen.append((len(images), len(outputs), targets.tolist()))
            return outputs.sum()

    monkeypatch.setattr("training.run.build_criterion", lambda *_: Loss())
    options = ("--aug-splits", "3", "--mixup", "0", "--cutmix", "0", "--epochs", "2")
    assert train(images, tmp_path, *options) == 0
    assert {(images, outputs, len(targets)) for images, outputs, targets in seen} == {(12, 12, 12)}
    assert all(targets[:4] * 3 == targets for _, _, targets in seen)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_transform_that_fails_ends_the_run_with_one_line(images, tmp_path, own, capfd, workers):
    options = (*own[:2], "--transform", "shrinks", "--num-workers", workers)
    assert train(images, tmp_path / "run", *options, "--on-bad-image", "skip") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert lines == [
        "error: --transform: shrinks gave back RGB of 3 × 3 pixels: it must be RGB of 8 × 8 "
        "pixels, as it came"
    ]
