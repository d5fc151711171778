"""augmentation/steps.py and plans.py: what is drawn one by one, and for a whole batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import LEVEL, MEAN, PLAIN, PREPROCESSING, SAMPLES, STD, augment, batch, pixels
from scipy import stats
from timm.data import create_transform
from timm.data.dataset import AugMixDataset
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from augmentation.policy import KINDS, kind_of
from augmentation.steps import build_policy
from augmentation.transforms import TrainTransform
from config import AugmentOptions
from utils import derive_seed, seed_all

FILL = [round(255 * m) for m in MEAN]


def plan_of(count: int = SAMPLES, **changes):
    return augment(replace(PLAIN, **changes)).plan(0, np.arange(count))


# --- geometry and colours -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_rotation_and_perspective_are_torchvisions(mode):
    options = replace(PLAIN, rotate=30.0, perspective=0.4, train_interpolation=mode)
    ours = TrainTransform(PREPROCESSING, replace(options, scale=(1, 1), ratio=(1, 1)))
    theirs = transforms.Compose(
        [
            transforms.RandomRotation(30.0, InterpolationMode(mode), fill=FILL),
            transforms.RandomPerspective(0.4, 1.0, InterpolationMode(mode), FILL),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    for seed in range(10):
        image = Image.fromarray(pixels(64, 64, seed=seed))
        ours.base.transforms[0] = lambda image: image  # the crop draws too
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert torch.equal(ours(image), expected)


def test_rotation_is_uniform_and_its_filter_drawn_where_that_is_random():
    plan = plan_of(rotate=25.0, train_interpolation="random")
    assert {KINDS[k] for k in plan.kinds[:, 0]} == {"rotate"}
    assert stats.kstest(plan.arguments[:, 0], "uniform", (-25, 50)).pvalue > LEVEL
    assert 0.47 < plan.cubic[:, 0].mean() < 0.53


def test_perspective_has_torchvisions_corners():
    """The coefficients tell where the corners of an image go."""
    warps = plan_of(400, perspective=0.5).warps.astype(np.float64)
    to_input = np.concatenate([warps, np.ones((400, 1))], 1).reshape(400, 3, 3)
    corners = np.array([[0, 0, 1], [63, 0, 1], [63, 63, 1], [0, 63, 1]], float).T
    found = np.linalg.inv(to_input) @ corners
    ends = np.rint((found[:, :2] / found[:, 2:]).transpose(0, 2, 1)).astype(int)  # (400, 4, 2)
    torch.manual_seed(0)
    theirs = [transforms.RandomPerspective.get_params(64, 64, 0.5)[1] for _ in range(400)]
    for corner in range(4):
        for axis in range(2):
            mine, other = ends[:, corner, axis], np.array(theirs)[:, corner, axis]
            assert set(mine) <= set(range(17)) | set(range(47, 64))
            assert stats.ks_2samp(mine, other).pvalue > LEVEL


def test_jitter_of_each_part_has_its_own_range():
    plan = plan_of(color_jitter=(0.4, 0.0, 1.5, 0.1), color_jitter_prob=0.7)
    done = plan.kinds > 0
    assert 0.67 < done.any(1).mean() < 0.73
    assert set(done.sum(1)) == {0, 3}
    ranges = {"brightness": (0.6, 0.8), "saturation": (0.0, 2.5), "hue": (-0.1, 0.2)}
    assert {KINDS[k] for k in plan.kinds[done]} == ranges.keys()
    for name, (low, width) in ranges.items():
        values = plan.arguments[plan.kinds == KINDS.index(name)]
        assert stats.kstest(values, "uniform", (low, width)).pvalue > LEVEL
    # Each order as often: which of the three comes first.
    first = [row[row > 0][0] for row in plan.kinds if row.any()]
    assert stats.chisquare(np.unique(first, return_counts=True)[1]).pvalue > LEVEL


def test_grey_and_blurred_are_drawn_alone():
    plan = plan_of(grayscale_prob=0.2, blur_prob=0.4)
    grey, blurred = (plan.kinds > 0).T
    assert [KINDS[plan.kinds[:, i].max()] for i in (0, 1)] == ["grey", "gaussian"]
    table = np.histogram2d(grey, blurred, bins=2)[0]
    assert stats.chisquare(table.ravel(), SAMPLES * np.array([0.48, 0.32, 0.12, 0.08])).pvalue > (
        LEVEL
    )
    stds = plan.arguments[blurred, 1]
    assert stats.kstest(stds, "uniform", (0.1, 1.9)).pvalue > LEVEL


def test_new_draws_leave_the_others_as_they_were():
    before = augment(AugmentOptions()).plan(3, np.arange(64))
    options = AugmentOptions(rotate=10.0, perspective=0.2, grayscale_prob=0.5, blur_prob=0.5)
    after = augment(options).plan(3, np.arange(64))
    assert np.array_equal(before.kinds, after.kinds[:, 2:4])
    assert np.array_equal(before.arguments, after.arguments[:, 2:4])
    for name in ("flips", "boxes", "noise"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


def test_a_whole_batch_has_the_statistics_of_the_pillow_chain():
    options = AugmentOptions(
        aa=None,
        color_jitter=(0.4, 0.4, 0.4, 0.2),
        color_jitter_prob=0.8,
        grayscale_prob=0.2,
        blur_prob=0.5,
        rotate=40.0,
        perspective=0.4,
        reprob=0.0,
    )
    image = Image.fromarray(pixels(64, 64))
    theirs = TrainTransform(PREPROCESSING, options)
    theirs.base.transforms[0] = lambda image: image
    seed_all(0)
    expected = torch.stack([theirs(image) for _ in range(200)])
    ours = augment(options)
    found = ours(batch(1, height=64, width=64).repeat(200, 1, 1, 1), ours.plan(0, np.arange(200)))
    for side in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
        assert stats.ks_2samp(side(expected), side(found)).pvalue > LEVEL


# --- AutoAugment's tables -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_tables_are_torchvisions(name):
    theirs = AutoAugment(AutoAugmentPolicy(name), InterpolationMode.BICUBIC, FILL)
    ours = build_policy(name, PREPROCESSING, "bicubic")
    for seed in range(30):
        image = Image.fromarray(pixels(seed=seed))
        seed_all(seed)
        expected = np.array(theirs(image))
        seed_all(seed)
        assert np.array_equal(np.array(ours(image)), expected)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_tables_by_the_batch_are_torchvisions(name, monkeypatch):
    """The draws by their numbers, the pixels by an image of each pair of operations."""
    calls = []
    monkeypatch.setattr(
        "torchvision.transforms.autoaugment._apply_op",
        lambda image, op, magnitude, **_: calls.append((op, round(magnitude, 4))) or image,
    )
    policy = AutoAugment(AutoAugmentPolicy(name))
    torch.manual_seed(0)
    image = Image.fromarray(pixels(64, 64))
    for _ in range(1500):
        policy(image)
    plan = plan_of(1500, aa=name)
    mine = [
        (KINDS[k], round(float(a), 3))
        for k, a in zip(plan.kinds.flat, plan.arguments.flat, strict=True)
    ]
    other = []
    for op, magnitude in calls:
        kind = KINDS[kind_of(op)]
        if kind in ("saturation", "contrast", "brightness", "sharpness"):
            magnitude += 1
        elif kind.startswith("translate"):
            magnitude = int(magnitude)
        elif kind == "solarize":
            magnitude = np.ceil(magnitude)
        other.append((kind, round(float(magnitude), 3)))
    mine = [call for call in mine if call[0] != "none"]
    both = sorted(set(mine) | set(other))
    counts = np.array([[side.count(call) for call in both] for side in (mine, other)])
    assert counts[:, counts.max(0) > 15].min() > 0
    assert stats.chi2_contingency(counts[:, counts.sum(0) > 10]).pvalue > LEVEL


def test_tables_by_the_batch_give_torchvisions_pixels():
    """Each operation of the tables, on one image; a sign may mean the other direction."""
    image = Image.fromarray(pixels(64, 64))
    filling = {"interpolation": InterpolationMode.BILINEAR, "fill": FILL}
    ours = augment(replace(PLAIN, aa="cifar10"))
    table, theirs = ours.planner.policy, AutoAugment(AutoAugmentPolicy.CIFAR10)
    space = theirs._augmentation_space(10, (64, 64))
    for row, pair in enumerate(theirs.policies):
        for column, (name, _, magnitude) in enumerate(pair):
            levels, signed = space[name]
            level = float(levels[magnitude]) if magnitude is not None else 0.0
            assert bool(table.signs[row, column]) == signed
            level = -level if name.startswith("Translate") else level
            expected = torch.from_numpy(np.array(_apply_op(image, name, level, **filling)))
            argument = table.offsets[row, column] + table.arguments[row, column]
            plan = ours.plan(0, np.arange(1))._replace(
                kinds=table.kinds[row, column].astype(np.int64).reshape(1, 1),
                arguments=np.float32(argument).reshape(1, 1),
                cubic=np.zeros((1, 1), dtype=bool),
            )
            found = ours.alter(batch(1, height=64, width=64), plan)[0].permute(1, 2, 0)
            difference = (found.int() - expected.int()).abs()
            assert (difference > 1).float().mean() <= 0.006, name


# --- augmentation splits --------------------------------------------------------------------------


@pytest.mark.parametrize("resplit", [False, True])
def test_splits_are_those_of_timm(resplit):
    """Sample for sample, timm's data set around the parts of its own transform."""
    options = AugmentOptions(
        aa="augmix-m5-w4-d2", aug_splits=3, reprob=0.0 if resplit else 1.0, resplit=resplit
    )
    parts = create_transform(
        64,
        is_training=True,
        color_jitter=0.3,
        auto_augment="augmix-m5-w4-d2",
        interpolation="bicubic",
        re_prob=0.0 if resplit else 1.0,
        re_mode="pixel",
        mean=MEAN,
        std=STD,
        separate=True,
    )

    class Images(list):
        transform = parts

        def __getitem__(self, index):
            return self.transform(super().__getitem__(index)), 0

    images = [Image.fromarray(pixels(80, 70, seed=seed)) for seed in range(6)]
    theirs, ours = AugMixDataset(Images(images), 3), TrainTransform(PREPROCESSING, options, 5)
    for number, image in enumerate(images):
        seed = derive_seed(5, "sample", 2, number)
        random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
        expected, _ = theirs[number]
        assert torch.equal(ours.apply(image, 2, number), torch.stack(expected))


def test_the_clean_split_is_not_erased_with_resplit():
    image = Image.fromarray(pixels(64, 64))
    options = replace(PLAIN, reprob=1.0, remode="const", aug_splits=2, resplit=True)
    clean, other = TrainTransform(PREPROCESSING, options).apply(image, 0, 0)
    assert (clean == 0).sum() == 0 < (other == 0).sum()
    plan = augment(options).plan(0, np.arange(5))
    heights = plan.boxes[..., 1] - plan.boxes[..., 0]
    assert heights[:5].max() == 0 < heights[5:].min()


def test_splits_by_the_batch_share_crop_flips_and_geometry():
    options = AugmentOptions(
        aug_splits=3, vflip=0.5, rotate=20.0, reprob=0.0, train_interpolation="random"
    )
    ours = augment(options)
    x, plan = batch(8, height=64, width=64), ours.plan(1, np.arange(8))
    clean, second, third = ours(x, plan).split(8)
    alone = augment(replace(options, aug_splits=0, aa=None, color_jitter=None))
    assert torch.equal(clean, alone(x, alone.plan(1, np.arange(8))))
    assert not torch.equal(second, third) and not torch.equal(clean, second)
    assert np.array_equal(plan.flips[:8], plan.flips[16:])
    assert np.array_equal(plan.arguments[:8, 0], plan.arguments[8:16, 0])
    assert np.array_equal(plan.cubic[:8, 0], plan.cubic[16:, 0])
    # Done ahead by a worker, it is the same.
    altered = ours.alter(x, plan)
    assert torch.equal(ours(altered, plan.altered()), torch.cat([clean, second, third]))
