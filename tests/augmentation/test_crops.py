"""augmentation/crops.py, against timm and Pillow."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pixels import LEVEL, PLAIN, PREPROCESSING, SAMPLES, STD, as_tensor, augment, batch, pixels
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data.transforms import RandomResizedCropAndInterpolation

from augmentation.batch import CROP, BatchAugment
from augmentation.crops import movable, random_rectangle, resize, take_crops
from augmentation.draws import Numbers
from augmentation.protocol import Cut, Parts
from augmentation.transforms import TrainTransform
from pipeline.decoding import open_parts
from utils import derive_seed, seed_all


def of_crop(position):
    """The numbers that the crop at this position of epoch 0 draws, for seed 0."""
    return Numbers(derive_seed(derive_seed(0, "sample", 0), CROP), position)


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


# --- images that are decoded at a part of their size ----------------------------------------------


class Asked(Parts):
    """A decoded image that notes what is asked for."""

    def __init__(self, pixels):
        super().__init__(pixels)
        self.asked = []

    def part(self, box, least=None):
        self.asked.append((box, least))
        return super().part(box, least)


@pytest.mark.parametrize("kind", [BatchAugment, TrainTransform])
@pytest.mark.parametrize("src", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_the_same_rectangles_are_drawn_with_and_without_scaling(kind, src, interpolation):
    image = as_tensor(pixels(100, 130))
    plain = Image.fromarray(pixels(100, 130))
    options = replace(PLAIN, src=src, train_interpolation=interpolation, hflip=0.5)
    recipes = [replace(options, jpeg_scaling=scaling) for scaling in ("on", "off")]
    on, off = (kind(PREPROCESSING, recipe, 0) for recipe in recipes)
    for position in range(12):
        scaled, whole = Asked(image), Asked(image)
        found, expected = (t.apply(p, 3, position) for t, p in ((on, scaled), (off, whole)))
        assert [box for box, _ in scaled.asked] == [box for box, _ in whole.asked]
        assert {least for _, least in scaled.asked} == {(64, 64)}
        assert {least for _, least in whole.asked} == {None}
        # Nor does it matter how the image comes.
        decoded = off.apply(image if kind is BatchAugment else plain, 3, position)
        assert torch.equal(found, expected) and torch.equal(decoded, expected)


@pytest.mark.parametrize("kind", [BatchAugment, TrainTransform])
@pytest.mark.parametrize(
    ("number", "src", "most_mean", "most"),
    [(0, False, 2.5, 60), (1, False, 1.5, 40), (0, True, 1.5, 20), (1, True, 1, 15)],
)
def test_scaled_photographs_are_near_the_full_ones(kind, number, src, most_mean, most):
    """In levels of 255; the first photograph is full of fine lines, the other smooth."""
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[number]).save(buffer, "JPEG", quality=92)
    recipes = [replace(PLAIN, src=src, jpeg_scaling=scaling) for scaling in ("on", "off")]
    size = 64 if src else 96
    on, off = (kind(replace(PREPROCESSING, input_size=size), recipe, 0) for recipe in recipes)
    means, alike = [], 0
    for position in range(20):
        asked = Asked(torch.zeros(3, 427, 640, dtype=torch.uint8))
        off.apply(asked, 0, position)
        found, expected = (t.apply(open_parts(buffer), 0, position) for t in (on, off))
        if kind is TrainTransform:
            scale = 255 * torch.tensor(STD)[:, None, None]
            found, expected = found * scale, expected * scale
        difference = (found.float() - expected.float()).abs()
        if min(asked.asked[0][0][2:]) < 2 * size:
            assert not difference.any()
            alike += 1
        else:
            assert 0 < difference.max() < most
            means.append(difference.mean())
    assert len(means) >= 10 and (alike or src) and np.mean(means) < most_mean


def test_crops_of_sixteen_bits_are_moved_as_what_a_device_can_index():
    """CUDA can't index uint16; a device without pixels goes through the same operations."""
    images = torch.zeros(3, 2, 9, 8, dtype=torch.uint16)
    assert movable(images).dtype == torch.int16
    places = (np.array([2, 0]), np.array([1, 0]), np.array([0, 2]))
    crops = take_crops(images.to("meta"), *places, (5, 4))
    assert (crops.shape, crops.dtype) == ((2, 2, 5, 4), torch.uint16)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [2, 3, 4, 5])
def test_resizing_leaves_the_order_of_the_bytes(channels, interpolation):
    """Copies into planes and back took a fifth of a worker's time for an image that is kept."""
    decoded = torch.randint(0, 256, (60, 80, channels), dtype=torch.uint8)
    image = decoded.permute(2, 0, 1)
    for part in (image, image[:, 5:50, 7:70], image[:, :20, :30]):
        made = resize(Cut(part), (32, 40), interpolation)
        planes = part.contiguous()
        expected = F.interpolate(planes[None], (32, 40), mode=interpolation, antialias=True)[0]
        assert torch.equal(made, expected)
        assert made.permute(1, 2, 0).is_contiguous()
        assert resize(Cut(planes), (32, 40), interpolation).is_contiguous()
