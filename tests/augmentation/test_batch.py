"""augmentation/batch.py: a whole batch, against the Pillow chain.

Also of augmentation/plans.py and augmentation/protocol.py.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import (
    LEVEL,
    MEAN,
    PLAIN,
    PREPROCESSING,
    SAMPLES,
    STD,
    as_tensor,
    augment,
    batch,
    pixels,
)
from scipy import stats
from torchvision import transforms

from augmentation.batch import (
    BatchAugment,
    Normalise,
    augments_by_batch,
    build_train_transform,
    flipped,
)
from augmentation.policy import KINDS
from augmentation.transforms import TrainTransform
from config import AugmentOptions
from utils import seed_all


def test_jitter_and_three_augment_draw_as_torchvision_and_deit():
    options = AugmentOptions(aa=None, ThreeAugment=True, color_jitter=0.3, reprob=0.0)
    plan = augment(options).plan(0, np.arange(SAMPLES))
    first = [KINDS[k] for k in plan.kinds[:, 0]]
    assert set(first) == {"grey", "solarize", "blur"}
    assert stats.chisquare([first.count(k) for k in set(first)]).pvalue > LEVEL
    jitter = plan.kinds[:, 1:]
    assert {tuple(sorted(KINDS[k] for k in row)) for row in jitter} == {
        ("brightness", "contrast", "saturation")
    }
    assert len({tuple(row) for row in jitter}) == 6
    assert stats.kstest(plan.arguments[:, 1:].ravel(), "uniform", (0.7, 0.6)).pvalue > LEVEL
    radius = plan.arguments[[k == "blur" for k in first], 0]
    assert stats.kstest(radius, "uniform", (0.1, 1.9)).pvalue > LEVEL


def test_three_augment_erases_nothing():
    options = AugmentOptions(ThreeAugment=True, reprob=1.0)
    ours = augment(options)
    plan = ours.plan(0, np.arange(8))
    assert plan.boxes.size == 0 and plan.noise.size == 0
    x = batch(8, height=64, width=64)
    without = augment(replace(options, reprob=0.0))
    assert torch.equal(ours(x, plan), without(x, without.plan(0, np.arange(8))))


def test_kernel_is_drawn_where_interpolation_is_random():
    options = AugmentOptions(train_interpolation="random")
    cubic = augment(options).plan(0, np.arange(SAMPLES)).cubic
    assert 0.47 < cubic.mean() < 0.53
    assert (
        not augment(replace(options, train_interpolation="bilinear"))
        .plan(0, np.arange(9))
        .cubic.any()
    )


def test_plan_of_an_image_depends_on_its_place_alone():
    ours = augment(AugmentOptions(recount=2, reprob=0.9))
    whole = ours.plan(3, np.arange(64))
    part = ours.plan(3, np.array([50, 7]))
    for left, right in zip(whole, part, strict=True):
        assert np.array_equal(left[[50, 7]], right)
    other = ours.plan(4, np.arange(64))
    assert not np.array_equal(whole.kinds, other.kinds)
    x = batch(64, height=64, width=64)
    assert torch.equal(ours(x, whole)[[50, 7]], ours(x[[50, 7]], part))


def test_batch_leaves_its_input_alone():
    x = batch(8, height=64, width=64)
    before = x.clone()
    ours = augment(AugmentOptions(reprob=1.0))
    ours(x, ours.plan(0, np.arange(8)))
    assert torch.equal(x, before)


def test_the_order_of_bytes_in_a_batch_changes_nothing():
    x = batch(16, height=64, width=64)
    by_pixel = x.contiguous(memory_format=torch.channels_last)
    for ours in (augment(), augment(AugmentOptions(reprob=0.5))):
        plan = ours.plan(0, np.arange(16))
        values = ours(by_pixel, plan)
        assert torch.equal(values, ours(x, plan))
        assert values.is_contiguous()


def test_without_augmentation_only_normalises():
    x = batch(4, height=64, width=64)
    expected = torch.stack(
        [
            transforms.Normalize(MEAN, STD)(transforms.ToTensor()(pixels(64, 64, seed=i)))
            for i in range(4)
        ]
    )
    ours = augment()
    assert torch.equal(ours(x, ours.plan(0, np.arange(4))), expected)
    assert torch.equal(Normalise(PREPROCESSING)(x), expected)


def test_flips():
    x = batch(200, height=64, width=64)
    ours = augment(replace(PLAIN, hflip=0.5, vflip=0.25))
    plan = ours.plan(0, np.arange(200))
    result = flipped(x, plan.flips)
    for i, (across, down) in enumerate(plan.flips):
        expected = x[i].flip(2) if across else x[i]
        assert torch.equal(result[i], expected.flip(1) if down else expected)
    assert 0.4 < plan.flips[:, 0].mean() < 0.6
    assert 0.15 < plan.flips[:, 1].mean() < 0.35


def test_whole_recipe_has_the_statistics_of_the_pillow_chain():
    """Mean and std of augmented pixels, over many draws of one image."""
    options = AugmentOptions()
    image = Image.fromarray(pixels(90, 110))
    theirs = TrainTransform(PREPROCESSING, options)
    seed_all(0)
    expected = torch.stack([theirs(image) for _ in range(600)])
    ours = augment(options)
    crops = torch.stack([ours.apply(as_tensor(image), 0, i) for i in range(600)])
    found = ours(crops, ours.plan(0, np.arange(600)))
    for side in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
        assert stats.ks_2samp(side(expected), side(found)).pvalue > LEVEL


def test_global_generators_are_not_drawn_from():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    ours = augment(AugmentOptions(reprob=1.0))
    x = ours.apply(batch(1)[0], 0, 0)[None]
    ours(x, ours.plan(0, np.arange(1)))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_images_are_kept_where_the_crop_moves_whole_pixels():
    small = replace(PREPROCESSING, input_size=32)
    assert augment(PLAIN).for_store() is None
    assert augment(replace(PLAIN, src=True)).for_store() is not None
    assert augment(PLAIN, small).for_store() is not None
    assert augment(replace(PLAIN, train_interpolation="random"), small).for_store() is None


def test_a_plan_is_done_in_two_parts():
    """First what leaves images uint8, then the rest: as all at once."""
    ours = augment(AugmentOptions(reprob=0.8))
    x, plan = batch(16, height=64, width=64), ours.plan(0, np.arange(16))
    altered = ours.alter(x, plan)
    assert altered.dtype == torch.uint8
    assert torch.equal(ours(altered, plan.altered()), ours(x, plan))
    half = ours(altered[4:8], plan.altered().of(slice(4, 8)))
    assert torch.equal(half, ours(x, plan)[4:8])


@pytest.mark.parametrize(
    ("options", "by_batch"),
    [
        ({}, True),
        ({"augment_on": "device"}, True),
        ({"augment_on": "cpu"}, False),
        ({"aa": "augmix-m5-w4-d2"}, False),
    ],
)
def test_training_is_augmented_by_the_batch_where_that_can_be_done(options, by_batch):
    options = AugmentOptions(**options)
    transform = build_train_transform(PREPROCESSING, options, 7)
    assert isinstance(transform, BatchAugment if by_batch else TrainTransform)
    assert augments_by_batch(options) is transform.by_batch is by_batch
    assert transform.seed == 7
