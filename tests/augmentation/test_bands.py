"""Crops, flips and erasing of bands and of 16 bits, channel by channel beside Pillow and RGB."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation.batch import BatchAugment, Normalise, build_train_transform
from augmentation.preprocessing import Preprocessing, per_channel
from augmentation.transforms import CentreCrop, EvalTransform
from config import AugmentOptions

RNG = np.random.default_rng(0)
PLAIN = AugmentOptions(aa=None, color_jitter=None, repeated_aug=False)


def prepared(channels: int, depth: int = 8, **changes) -> Preprocessing:
    mean, std = (0.4,) * channels, (0.2,) * channels
    return Preprocessing(40, 0.875, "bicubic", mean, std, bit_depth=depth, **changes)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_crops_each_band_as_pillow_does(mode):
    pixels = torch.from_numpy(RNG.integers(0, 256, (5, 50, 70), dtype=np.uint8))
    found = CentreCrop(prepared(5, crop_mode=mode)).keep(pixels)
    rgb = CentreCrop(prepared(3, crop_mode=mode))
    for chosen in ((0, 1, 2), (2, 3, 4)):
        image = Image.fromarray(pixels[list(chosen)].permute(1, 2, 0).numpy())
        assert torch.equal(found[list(chosen)], rgb.keep(image))


def test_sixteen_bits_keep_what_eight_would_lose():
    pixels = torch.from_numpy(RNG.integers(0, 200, (2, 40, 40)).astype(np.uint16))
    transform = EvalTransform(dataclasses.replace(prepared(2, 16), crop_ratio=1.0))
    wanted = (pixels.float() / 65535 - 0.4) / 0.2
    torch.testing.assert_close(transform(pixels), wanted)
    torch.testing.assert_close(Normalise(prepared(2, 16))(pixels[None])[0], wanted)


@pytest.mark.parametrize("options", [PLAIN, dataclasses.replace(PLAIN, src=True)])
@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
def test_training_treats_bands_as_it_treats_colours(options, remode):
    """Where nothing is erased, three of six bands get the pixels that they would have as RGB."""
    options = dataclasses.replace(options, reprob=0.5, remode=remode, vflip=0.5)
    pixels = torch.from_numpy(RNG.integers(0, 256, (6, 60, 50), dtype=np.uint8))
    six, rgb = (BatchAugment(prepared(n), options, seed=1) for n in (6, 3))
    positions = np.arange(6)
    plan = six.plan(0, positions)
    both = []
    for transform, image in ((six, pixels), (rgb, pixels[3:])):
        images = torch.stack([transform.apply(image, 0, p) for p in positions])
        both.append(transform(images, transform.plan(0, positions)))
    assert plan.flips.any()
    kept = torch.from_numpy((plan.boxes[:, 0, 1] == plan.boxes[:, 0, 0]).copy())
    assert 0 < kept.sum() < 6
    assert torch.equal(both[0][kept][:, 3:], both[1][kept])
    assert not torch.equal(both[0][~kept], both[0][~kept].flip(1))


def test_sixteen_bits_are_flipped_cropped_and_rounded():
    options = dataclasses.replace(PLAIN, reprob=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0)
    transform = BatchAugment(prepared(2, 16), options, seed=1)
    pixels = torch.from_numpy(RNG.integers(0, 65536, (2, 40, 40)).astype(np.uint16))
    images = transform.apply(pixels, 0, 0)[None]
    assert torch.equal(images[0], pixels)
    found = transform.alter(images, transform.plan(0, np.array([0])))
    assert np.array_equal(found[0].numpy(), pixels.numpy()[:, :, ::-1])
    shrunk = transform.apply(torch.from_numpy(np.full((2, 80, 90), 60001, np.uint16)), 0, 1)
    assert shrunk.dtype == torch.uint16
    assert (shrunk.int() == 60001).all()


@pytest.mark.parametrize("name", ["rotate", "perspective", "blur_prob"])
def test_sixteen_bits_are_turned_and_blurred_as_eight(name):
    """An image of 257 times the levels becomes 257 times what it would; fractions are kept."""
    value = 20.0 if name == "rotate" else 1.0
    options = dataclasses.replace(PLAIN, reprob=0.0, **{name: value})
    pixels = torch.from_numpy(RNG.integers(0, 256, (2, 8, 40, 40), dtype=np.uint8))
    positions, results = np.arange(8), []
    for depth, scale in ((8, 1), (16, 257)):
        transform = BatchAugment(prepared(2, depth), options, seed=1)
        images = pixels.transpose(0, 1).numpy() * np.asarray(scale, f"u{depth // 8}")
        plan = transform.plan(0, positions)
        found = transform.alter(torch.from_numpy(images), plan)
        assert plan.kinds.any(1).all()
        assert found.dtype == (torch.uint8 if depth == 8 else torch.uint16)
        results.append(found.numpy().astype(np.float64))
    apart = np.abs(results[1] / 257 - results[0])
    assert (apart > 1).mean() < 1e-3  # a border that falls on the other side
    assert len(np.unique(results[1] % 257)) > 200


def test_what_is_flat_stays_what_it_is():
    """Fractions are rounded at the end: cut off, most levels would be one too low."""
    options = dataclasses.replace(PLAIN, reprob=0.0, hflip=0.0, blur_prob=1.0)
    transform = BatchAugment(prepared(2, 16), options, seed=1)
    levels = np.arange(60_001, 60_065).repeat(2 * 16 * 16).reshape(64, 2, 16, 16)
    images = torch.from_numpy(levels.astype(np.uint16))
    assert torch.equal(transform.alter(images, transform.plan(0, np.arange(64))), images)


@pytest.mark.parametrize("depth", [8, 16])
def test_one_by_one_as_by_the_batch(depth):
    """The same draws and pixels, with what pixels of 8 and of 16 bits have and with splits."""
    options = dataclasses.replace(PLAIN, reprob=0.6, rotate=20.0, perspective=0.5, blur_prob=0.5)
    levels = RNG.integers(0, 2**depth, (6, 2, 50, 60)).astype(f"u{depth // 8}")
    positions = np.arange(4, 10)
    for splits in (0, 2):
        chosen = dataclasses.replace(options, aug_splits=splits)
        batch = build_train_transform(prepared(2, depth), chosen, 3)
        one = build_train_transform(
            prepared(2, depth), dataclasses.replace(chosen, augment_on="cpu"), 3
        )
        assert (batch.by_batch, one.by_batch, one.plan(5, positions)) == (True, False, None)
        given = [
            (torch.from_numpy(image), 5, int(p)) for image, p in zip(levels, positions, strict=True)
        ]
        images = torch.stack([batch.apply(*each) for each in given])
        wanted = batch(images, batch.plan(5, positions))
        found = torch.stack([one.apply(*each) for each in given])
        assert torch.equal(found.transpose(0, 1).flatten(0, 1) if splits else found, wanted)


def test_greys_have_the_policies_of_colours():
    options = AugmentOptions(repeated_aug=False, reprob=0.0)
    grey, rgb = (BatchAugment(prepared(n), options, seed=1) for n in (1, 3))
    pixels = torch.from_numpy(RNG.integers(0, 256, (1, 60, 50), dtype=np.uint8))
    positions = np.arange(24)
    results = []
    for transform, image in ((grey, pixels), (rgb, pixels.expand(3, -1, -1).contiguous())):
        images = torch.stack([transform.apply(image, 0, p) for p in positions])
        results.append(transform.alter(images, transform.plan(0, positions)).int())
    # The luma of three equal levels is one of them but for rounding.
    assert (results[0] - results[1]).abs().max() <= 1


def test_means_of_other_channels():
    assert per_channel((0.1, 0.2, 0.6), 4) == (pytest.approx(0.3),) * 4
    assert per_channel((0.5,), 2) == (0.5, 0.5)
    steps = prepared(5, 16).steps()
    assert steps[0]["channels"] == 5
    assert steps[0]["bit_depth"] == 16
    assert steps[3]["from"] == [0, 65535]
    assert "bit_depth" not in prepared(3).to_dict()
    assert Preprocessing.from_dict(prepared(5, 16).to_dict()) == prepared(5, 16)
