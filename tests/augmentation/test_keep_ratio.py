"""augmentation/keep_ratio.py: against timm's rkrc and rkrr, one by one and by the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import MEAN, PLAIN, PREPROCESSING, STD, as_tensor
from scipy import stats
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio

from augmentation import keep_ratio, windows
from augmentation.batch import BatchAugment
from augmentation.transforms import TrainTransform
from utils import seed_all

GENTLE = {"scale": (0.5, 1.0), "ratio": (0.6, 1 / 0.6)}
SIZES = [(90, 70), (300, 40), (31, 50)]  # width and height, also smaller than the input


def image_of(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def options(mode, **changes):
    return replace(PLAIN, train_crop_mode=mode, hflip=0.0, **(GENTLE | changes))


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
@pytest.mark.parametrize("interpolation", ["random", "bicubic"])
@pytest.mark.parametrize("input_size", [64, (40, 64)])
def test_one_by_one_it_is_timms(mode, interpolation, input_size):
    preprocessing = replace(PREPROCESSING, input_size=input_size)
    ours = TrainTransform(preprocessing, options(mode, train_interpolation=interpolation))
    theirs = create_transform(
        input_size,
        is_training=True,
        train_crop_mode=mode,
        interpolation=interpolation,
        hflip=0.0,
        color_jitter=None,
        mean=MEAN,
        std=STD,
        **GENTLE,
    )
    for size in SIZES:
        image = image_of(*size)
        for seed in range(12):
            seed_all(seed)
            expected = theirs(image)
            seed_all(seed)
            assert torch.equal(ours(image), expected), (size, seed)


def test_the_batch_path_draws_what_timm_draws(monkeypatch):
    """Heights, widths and corners of 2,000 images, each against timm's own draws."""
    seen = []

    def note(cut, size, interpolation):
        seen.append(tuple(size))
        return torch.zeros(3, *size, dtype=torch.uint8)

    monkeypatch.setattr(keep_ratio, "resize", note)
    augment = BatchAugment(PREPROCESSING, options("rkrr"), 0)
    image = torch.zeros(3, 90, 130, dtype=torch.uint8)
    for position in range(2000):
        augment.apply(image, 0, position)
    seed_all(0)
    arguments = 0.0, 0.5, GENTLE["scale"], True, 0.5, GENTLE["ratio"]
    theirs = [ResizeKeepRatio.get_params(image, (64, 64), *arguments) for _ in range(2000)]
    for ours, expected in zip(np.array(seen).T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(ours, expected).pvalue > 1e-3
    assert sum(size == (64, 92) for size in seen) / 2000 == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
@pytest.mark.parametrize("size", SIZES)
def test_the_batch_path_cuts_out_the_same_part(mode, size, monkeypatch):
    """The window of Pillow's image that it would be, also where it is mirrored."""
    image, places = image_of(*size), []
    augment = BatchAugment(replace(PREPROCESSING, input_size=(40, 64)), options(mode), 0)
    given = [augment.apply(as_tensor(image), 0, position) for position in range(20)]
    whole = windows.window

    def note(*arguments):
        places.append(arguments[2])
        return whole(*arguments)

    monkeypatch.setattr(keep_ratio, "window", note)
    monkeypatch.setattr(keep_ratio, "is_made_whole", lambda *_: False)
    for position, ours in enumerate(given):
        expected = augment.apply(as_tensor(image), 0, position)
        assert ours.dtype == torch.uint8 and ours.shape == expected.shape == (3, 40, 64)
        assert (ours.int() - expected.int()).abs().max() <= 2, position
    corners = np.array(places)  # left and top
    if mode == "rkrr":
        assert len(np.unique(corners, axis=0)) > 5
    assert (corners < 0).any()  # some are mirrored


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_small_inputs_are_cropped_that_way_where_it_is_asked_for(mode):
    small = replace(PREPROCESSING, input_size=16)
    augment = BatchAugment(small, options(mode), 0)
    assert augment.for_store() is None
    assert augment.apply(as_tensor(image_of(30, 20)), 0, 0).shape == (3, 16, 16)
