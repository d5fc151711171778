"""augmentation/windows.py: the same part of a resized image, made whole or not."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import MEAN, PLAIN, STD, as_tensor, pixels
from runs import ROOT
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from augmentation import windows
from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import CentreCrop, EvalTransform, PaddedRandomCrop, TrainTransform
from utils import seed_all

FILTERS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
PREPROCESSING = Preprocessing(64, 0.875, "bicubic", MEAN, STD)


def image_of(width, height):
    return Image.fromarray(pixels(height, width))


def difference(first, second):
    return np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max()


@pytest.fixture
def none_whole(monkeypatch):
    """No enlarged image is made whole."""
    monkeypatch.setattr(windows, "MOST_PIXELS", 0)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (301, 7), (40, 41), (30, 1), (1, 30)])
@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("interpolation", FILTERS)
def test_the_centre_is_that_of_the_whole(size, ratio, interpolation, none_whole):
    image = image_of(*size)
    crop = CentreCrop(Preprocessing(64, ratio, interpolation, MEAN, STD))
    theirs = create_transform(
        64, crop_pct=ratio, interpolation=interpolation, mean=(0,) * 3, std=(1,) * 3
    )
    expected = (theirs(image).permute(1, 2, 0) * 255).round()
    off = np.abs(np.asarray(crop.crop(image), dtype=int) - np.asarray(expected)).max(2)
    if interpolation in ("nearest", "box"):  # a place between two pixels may take either
        assert (off > 1).mean() < 0.06
    else:
        assert off.max() <= 2


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (700, 2)])
def test_the_long_side_may_leave_nothing_of_the_short_one(size):
    """timm asks for a short side of 0 pixels there."""
    image = Image.new("RGB", size, (200, 10, 30))
    cropped = np.asarray(CentreCrop(replace(PREPROCESSING, crop_mode="border")).crop(image))
    inside = (cropped == (200, 10, 30)).all(2)
    assert inside.any(int(size[0] < size[1])).sum() == 64 and inside.sum() == 64
    assert (cropped[~inside] == [round(255 * m) for m in MEAN]).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(600, 20), (1000, 32)])
def test_wide_images_of_an_ordinary_size_are_timms_to_the_bit(crop_mode, size):
    image = image_of(*size)
    ours = EvalTransform(replace(PREPROCESSING, crop_mode=crop_mode))
    theirs = create_transform(
        64, crop_pct=0.875, crop_mode=crop_mode, interpolation="bicubic", mean=MEAN, std=STD
    )
    assert torch.equal(ours(image), theirs(image))


# --- training -------------------------------------------------------------------------------------


def torchvisions(size, mirror):
    padding = {"padding": 4, "padding_mode": "reflect"} if mirror else {"padding": size // 8}
    resize = transforms.Resize(size, InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.RandomCrop(size, **padding)])


@pytest.mark.parametrize("image_size", [(90, 70), (50, 120), (73, 73), (8, 9), (400, 30)])
@pytest.mark.parametrize(("size", "mirror"), [(64, True), (32, False)])
def test_the_padded_crop_is_torchvisions(size, mirror, image_size, monkeypatch):
    image = image_of(*image_size)
    ours = PaddedRandomCrop((size, size), "bicubic", mirror=mirror)
    theirs = torchvisions(size, mirror)
    for seed in range(25):
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert np.array_equal(ours(image), expected), seed
    monkeypatch.setattr(windows, "MOST_PIXELS", 0)
    for seed in range(25):
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert difference(ours(image), expected) <= 1, seed


@pytest.mark.parametrize("image_size", [(90, 70), (20, 120)])
@pytest.mark.parametrize("size", [64, 32])
def test_the_batch_path_crops_the_same_part(size, image_size, monkeypatch):
    options = replace(PLAIN, src=True)
    augment = BatchAugment(replace(PREPROCESSING, input_size=size), options, 0)
    image = as_tensor(image_of(*image_size))
    whole = [augment.apply(image, 0, position) for position in range(20)]
    monkeypatch.setattr(windows, "MOST_PIXELS", 0)
    for position, expected in enumerate(whole):
        given = augment.apply(image, 0, position)
        assert given.dtype == torch.uint8 and given.shape == (3, size, size)
        # Pillow and PyTorch round differently between the two passes.
        assert difference(given, expected) <= 3, position


# --- cost -----------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import torch
from PIL import Image
from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import CentreCrop, EvalTransform, TrainTransform
from config import AugmentOptions

taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (320 << 20),) * 2)
plain = AugmentOptions(aa=None, color_jitter=None)
simple = AugmentOptions(aa=None, color_jitter=None, src=True)
for size in ((50_000, 1), (1, 2_000_000)):
    image = Image.new("RGB", size, (9, 8, 7))
    for side in (32, 224):
        for mode in ("center", "squash", "border"):
            shown = Preprocessing(side, 0.875, "bicubic", (0.5,) * 3, (0.2,) * 3, mode)
            for transform in (EvalTransform(shown), CentreCrop(shown)):
                assert transform.apply(image, 0, 0).shape == (3, side, side)
        tensor = torch.zeros(3, *size[::-1], dtype=torch.uint8)
        for options in (plain, simple):
            assert TrainTransform(shown, options).apply(image, 0, 1).shape == (3, side, side)
            batch = BatchAugment(shown, options, 0)
            assert batch.apply(tensor, 0, 1).shape == (3, side, side)
            if store := batch.for_store():
                assert store.keep(tensor).numel() <= max(tensor.numel(), 3 << 24)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_narrow_images_cost_what_others_do():
    """225 bytes of PNG would become 12.8 million × 256 pixels: 10 GB."""
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_interpolation_is_drawn_before_the_place():
    """Draws of a narrow image are those of any other."""
    narrow, other = (TrainTransform(PREPROCESSING, replace(PLAIN, src=True)) for _ in range(2))
    for seed in range(3):
        states = []
        for transform, size in ((narrow, (90_000, 1)), (other, (90, 70))):
            seed_all(seed)
            transform(Image.new("RGB", size))
            states.append(random.getstate())
        assert states[0] == states[1]
