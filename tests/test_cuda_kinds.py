"""What needs a CUDA card of other tasks and images than classes of colours (``test_cuda.py``)."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from on_cuda import DEVICE, command, needs_device, no_waits, on_card, trained
from PIL import Image
from runs import logged

import main
from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Form
from config import AugmentOptions

pytestmark = needs_device
SHORT = ("--epochs", "1", "--warmup-epochs", "0", "--log-interval", "1000")


@pytest.mark.parametrize(
    "more",
    [
        ("--in-chans", "1", "--color-jitter", "0.2"),
        ("--in-chans", "1", "--bit-depth", "16", "--rotate", "20", "--blur-prob", "0.5"),
        ("--in-chans", "3", "--bit-depth", "16", "--perspective", "0.4", "--cache", "device"),
        ("--aug-splits", "2", "--jsd-loss", "--mixup", "0", "--cutmix", "0"),
        ("--aa", "augmix-m3-w2", "--num-workers", "2"),
        ("--class-weights", "balanced", "--sampler", "balanced", "--no-repeated-aug"),
        ("--freeze", "blocks.*", "--opt", "lamb"),
    ],
    ids=" ".join,
)
def test_the_host_does_not_wait(tmp_path, more):
    with no_waits(4, 20) as modes:
        trained(tmp_path, *SHORT, *more)
    assert modes == ["error", "default", "default"]


def test_adapters(tmp_path):
    pytest.importorskip("peft")
    with no_waits(4, 20):
        trained(tmp_path, *SHORT, "--lora", "2")


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """A list of 220 images of 8 pixels whose channels show which of three labels they have."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    rows = [("image", "labels")]
    for number in range(220):
        has = rng.random(3) < 0.4
        pixels = rng.integers(0, 120, (8, 8, 3)) + 60 * has
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append((f"{number}.png", "|".join(np.array(["blue", "green", "red"])[has])))
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "list.csv"


@pytest.mark.parametrize("loss", [(), ("--loss", "asl"), ("--pos-weight", "balanced")])
def test_several_labels(several, tmp_path, loss):
    argv = [*command(tmp_path, *SHORT), "--task", "multilabel", "--data-set", "CSV"]
    argv += ["--data-path", str(several), "--val-fraction", "0.2", "--batch-size", "8"]
    with no_waits(4, 20):
        assert main.main([*argv, *loss]) == 0
    assert 0 < logged(tmp_path)[-1]["test_map"] <= 100


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--compile",), marks=on_card)], ids=["eager", "compiled"]
)
def test_sizes_that_change(tmp_path, more):
    """From the second epoch on images have another size."""
    sizes = ("--input-size", "16", "--train-sizes", "8:0", "16:1")
    assert trained(tmp_path, *sizes, *more)["epoch"] == 2


@pytest.mark.parametrize("form", [Form(5, 8), Form(2, 16), Form(1, 8)], ids=str)
def test_augmentation_of_other_images_is_that_of_the_cpu(form):
    """To one level, but for few pixels where the last digit decides between two."""
    values = (0.5,) * form.channels
    shape = Preprocessing(32, 1.0, "bicubic", values, values, bit_depth=form.bit_depth)
    options = AugmentOptions(
        aa=None, color_jitter=None, rotate=30.0, perspective=0.4, blur_prob=0.5, vflip=0.5
    )
    kind = np.uint8 if form.bit_depth == 8 else np.uint16
    pixels = np.random.default_rng(0).integers(0, form.levels + 1, (64, form.channels, 32, 32))
    images = torch.from_numpy(pixels.astype(kind))
    augment = BatchAugment(shape, options, 0)
    plan = augment.plan(0, np.arange(64))
    there = augment(images.to(DEVICE), plan).cpu()
    here = BatchAugment(shape, options, 0)(images, plan)
    assert ((there - here).abs() > 1.5 / 255 / 0.5).float().mean() < 1e-3
