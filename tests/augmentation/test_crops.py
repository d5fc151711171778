"""augmentation/crops.py, against timm and Pillow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import LEVEL, PLAIN, PREPROCESSING, SAMPLES, as_tensor, augment, batch, pixels
from scipy import stats
from timm.data.transforms import RandomResizedCropAndInterpolation

from augmentation.batch import CROP
from augmentation.crops import ATTEMPTS, random_rectangle
from augmentation.draws import Draws
from utils import derive_seed, seed_all


def of_crop(position):
    """The numbers that the crop at this position of epoch 0 draws, for seed 0."""
    return Draws(derive_seed(0, "sample", 0), CROP, np.array([position]), 2 * ATTEMPTS + 3)


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 2.0)])
def test_random_resized_crop_draws_from_timms_distribution(ratio):
    theirs = RandomResizedCropAndInterpolation(64, ratio=ratio)
    image = Image.new("RGB", (100, 75))
    seed_all(0)
    expected = np.array(
        [theirs.get_params(image, theirs.scale, theirs.ratio) for _ in range(SAMPLES)]
    )
    found = np.array(
        [random_rectangle(of_crop(p), 75, 100, PLAIN.scale, ratio) for p in range(SAMPLES)]
    )
    for column in range(4):
        assert stats.ks_2samp(expected[:, column], found[:, column]).pvalue > LEVEL
    assert (found[:, 0] + found[:, 2] <= 75).all() and (found[:, 1] + found[:, 3] <= 100).all()


def test_image_that_no_rectangle_fits_gives_its_middle():
    image = torch.zeros(3, 10, 400, dtype=torch.uint8)
    image[:, :, 194:206] = 200
    options = replace(PLAIN, scale=(0.9, 1.0))
    assert (augment(options).apply(image, 0, 0) > 150).float().mean() > 0.8


def test_crop_resizes_as_pillow():
    image = pixels(75, 100)
    ours = augment()
    for position in range(5):
        top, left, height, width = random_rectangle(
            of_crop(position), 75, 100, PLAIN.scale, PLAIN.ratio
        )
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(image).crop(box).resize((64, 64), Image.Resampling.BICUBIC)
        found = ours.apply(as_tensor(image), 0, position)
        assert (found.int() - as_tensor(expected).int()).abs().max() <= 1


@pytest.mark.parametrize(("size", "src"), [(32, False), (16, False), (48, True)])
def test_whole_pixel_crops_are_the_same_by_the_batch(size, src):
    ours = augment(replace(PLAIN, src=src), replace(PREPROCESSING, input_size=size))
    x = batch(20, height=size, width=size + 6)
    together = ours.take(ours.padded(x), np.arange(20), 5, np.arange(100, 120))
    for i in range(20):
        assert torch.equal(together[i], ours.apply(x[i], 5, 100 + i))
    # Some crop reaches into the margin, and what lies there is black or a reflection.
    shifts = {tuple(row) for row in together[:, 0, 0].tolist()}
    assert len(shifts) > 5
    corner = torch.stack([c[:, 0, 0] for c in together]).float().sum(1) == 0
    assert corner.any() == (not src)
