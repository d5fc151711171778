"""augment.py, against timm and torchvision."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform

from augment import (
    EvalTransform,
    Mixer,
    Preprocessing,
    ThreeAugment,
    TrainTransform,
    build_mixer,
    build_policy,
)
from config import AugmentOptions
from errors import OptionError
from utils import seed_all

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(64, 0.875, "bicubic", MEAN, STD)
PLAIN = AugmentOptions(aa=None, color_jitter=None, hflip=0.0, reprob=0.0)


def picture(width=90, height=70, seed=0):
    coarse = np.random.RandomState(seed).randint(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def timm_transform(**changes):
    options = {
        "input_size": 64, "is_training": True, "color_jitter": 0.3,
        "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "re_prob": 0.25,
        "re_mode": "pixel", "re_count": 1, "mean": MEAN, "std": STD,
    }  # fmt: skip
    return create_transform(**{**options, **changes})


# --- preprocessing ------------------------------------------------------------------------------


def test_preprocessing_survives_plain_values():
    values = PREPROCESSING.to_dict()
    assert {type(v) for v in values.values()} == {int, float, str, list}
    assert Preprocessing.from_dict(values) == PREPROCESSING


@pytest.mark.parametrize("size", [(90, 70), (50, 120), (73, 73)])
@pytest.mark.parametrize(("input_size", "ratio"), [(64, 0.875), (56, 0.9), (48, 1.0)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_timms(size, input_size, ratio, interpolation):
    image = picture(*size)
    ours = EvalTransform(Preprocessing(input_size, ratio, interpolation, MEAN, STD))
    theirs = create_transform(
        input_size, crop_pct=ratio, interpolation=interpolation, mean=MEAN, std=STD
    )
    assert torch.equal(ours(image), theirs(image))


def test_small_inputs_keep_the_whole_picture():
    image = picture(32, 32)
    transform = EvalTransform(Preprocessing(32, 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(transform(image), expected)
    assert transform(picture(8, 8)).shape == (3, 32, 32)
    assert transform(picture(8, 20)).shape == (3, 32, 32)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"train_interpolation": "random"}, {"interpolation": "random"}),
        ({"aa": "augmix-m5-w4-d2"}, {"auto_augment": "augmix-m5-w4-d2"}),
        ({"aa": "original-mstd0.5"}, {"auto_augment": "original-mstd0.5"}),
        ({"aa": "3a"}, {"auto_augment": "3a"}),
        ({"aa": "v0"}, {"auto_augment": "v0"}),
        ({"aa": None, "color_jitter": 0.4}, {"auto_augment": None, "color_jitter": 0.4}),
        ({"scale": (0.5, 0.6), "ratio": (1.5, 2.0)}, {"scale": (0.5, 0.6), "ratio": (1.5, 2.0)}),
        ({"vflip": 0.5, "hflip": 0.1}, {"vflip": 0.5, "hflip": 0.1}),
        (
            {"remode": "rand", "recount": 3, "reprob": 1.0},
            {"re_mode": "rand", "re_count": 3, "re_prob": 1.0},
        ),
    ],
)
def test_training_draws_what_timm_draws(ours, theirs):
    """The DeiT recipe and its variations, sample for sample."""
    mine = TrainTransform(PREPROCESSING, replace(AugmentOptions(), **ours))
    reference = timm_transform(**theirs)
    for seed in range(40):
        image = picture(seed=seed)
        seed_all(seed)
        expected = reference(image)
        seed_all(seed)
        assert torch.equal(mine(image), expected), f"seed {seed}"


def test_simple_random_crop_shows_the_short_side_whole():
    """--src: resized to the input size, padded by 4 in reflection, cropped."""
    transform = TrainTransform(
        Preprocessing(64, 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3), replace(PLAIN, src=True)
    )
    image = picture(128, 64)
    padded = np.pad(np.array(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    tops = set()
    for seed in range(10):
        seed_all(seed)
        crop = (transform(image).permute(1, 2, 0) * 255).round().byte().numpy()
        places = [
            (y, x)
            for y in range(9)
            for x in range(73)
            if np.array_equal(padded[y : y + 64, x : x + 64], crop)
        ]
        assert len(places) == 1
        tops.add(places[0])
    assert len(tops) > 5


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (8, 1), (4, 1)])
def test_small_inputs_are_cropped_with_zero_padding(size, padding):
    transform = TrainTransform(Preprocessing(size, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3), PLAIN)
    image = Image.new("RGB", (size, size), (255, 255, 255))
    borders = set()
    for seed in range(60):
        seed_all(seed)
        out = transform(image)
        assert out.shape == (3, size, size)
        borders.add(int((out[0].amax(dim=1) == 0).sum()))
    assert borders == set(range(padding + 1))
    assert transform(picture(3 * size, 2 * size)).shape == (3, size, size)


def test_three_augment_takes_each_operation_equally_often():
    image = picture(24, 24)
    grey, solarised = ThreeAugment.grey(image), ImageOps.solarize(image)
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    for _ in range(900):
        out = ThreeAugment()(image)
        counts["grey" if out == grey else "solarised" if out == solarised else "blurred"] += 1
    # 900 draws of a third: the deviation is 14
    assert all(250 < count < 350 for count in counts.values()), counts
    assert np.ptp(np.array(grey), axis=2).max() == 0


def test_three_augment_replaces_the_policy_and_keeps_jitter():
    kinds = [
        type(step).__name__
        for step in TrainTransform(
            PREPROCESSING, AugmentOptions(ThreeAugment=True)
        ).augment.transforms
    ]
    assert "ThreeAugment" in kinds and "ColorJitter" in kinds and "RandAugment" not in kinds


def test_first_copy_can_stay_unerased():
    transform = TrainTransform(PREPROCESSING, replace(PLAIN, reprob=1.0, resplit=True))
    untouched = TrainTransform(PREPROCESSING, PLAIN)
    image = picture()
    seed_all(1)
    expected = untouched(image)
    seed_all(1)
    assert torch.equal(transform(image, erase=False), expected)
    seed_all(1)
    assert not torch.equal(transform(image), expected)
    assert transform.resplit


@pytest.mark.parametrize(
    "name",
    ["rand", "rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.5-mmax10", "rand-tweights", "augmix", "v0",
     "v0r", "original", "originalr", "3a", "trivial"],
)  # fmt: skip
def test_policies_work(name):
    policy = build_policy(name, PREPROCESSING, "random")
    outputs = [policy(picture()) for _ in range(8)]
    assert all(out.size == (90, 70) and out.mode == "RGB" for out in outputs)
    assert any(out != picture() for out in outputs)


@pytest.mark.parametrize(
    "name",
    ["rnd-m9", "rand-x3", "rand-inc", "rand-m", "rand m9", "", "augmix-n2", "v1", "rand-tfoo"],
)
def test_unknown_policies_are_refused(name):
    with pytest.raises(OptionError, match="--aa: .*rand-m9"):
        build_policy(name, PREPROCESSING, "bicubic")


# --- batches ------------------------------------------------------------------------------------

MIXES = [
    {"mixup": 0.8, "cutmix": 1.0},
    {"mixup": 0.8, "cutmix": 0.0},
    {"mixup": 0.0, "cutmix": 1.0},
    {"mixup": 0.3, "cutmix": 1.0, "prob": 0.5, "switch_prob": 0.3},
    {"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": (0.2, 0.8)},
    {"mixup": 0.8, "cutmix": 0.5, "cutmix_minmax": (0.3, 0.6)},
]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixing_is_timms(mode, mix):
    mixer = Mixer(5, mode=mode, **mix)
    reference = Mixup(
        mixup_alpha=mix["mixup"],
        cutmix_alpha=mix["cutmix"],
        cutmix_minmax=mix.get("cutmix_minmax"),
        prob=mix.get("prob", 1.0),
        switch_prob=mix.get("switch_prob", 0.5),
        mode=mode,
        label_smoothing=0.0,
        num_classes=5,
    )
    for seed in range(12):
        images = torch.randn(6, 3, 24, 20)
        targets = torch.randint(5, (6,))
        kept = images.clone()
        mixed, soft = mixer(images, targets, seed)
        np.random.seed(seed)
        expected, expected_soft = reference(images.clone(), targets)
        assert torch.equal(images, kept)
        torch.testing.assert_close(mixed, expected)
        torch.testing.assert_close(soft, expected_soft)
        torch.testing.assert_close(soft.sum(1), torch.ones(6))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_odd_batches(mode, size):
    """Places i and B-1-i mix; targets follow the share of pixels; the middle stays as it is."""
    mixer = Mixer(size, mixup=0.8, cutmix=1.0, mode=mode)
    for seed in range(10):
        # Picture i is constant i, so the mean of the mixed picture tells its shares.
        images = torch.arange(size).float()[:, None, None, None].expand(size, 3, 16, 16)
        mixed, soft = mixer(images, torch.arange(size), seed)
        expected = soft @ torch.arange(size).float()
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected)
        torch.testing.assert_close(soft.sum(1), torch.ones(size))
        assert soft[size // 2, size // 2] == 1


def test_mixing_is_a_pure_function_of_the_seed():
    mixer = Mixer(3, mixup=0.8, cutmix=1.0, mode="elem")
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()
    first, again, other = (mixer(images, targets, seed)[0] for seed in (7, 7, 2**62 + 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]


def test_mixing_keeps_the_type_of_the_images():
    images, soft = Mixer(3, 0.8, 1.0)(
        torch.randn(4, 3, 8, 8).bfloat16(), torch.tensor([0, 1, 2, 0]), 1
    )
    assert images.dtype == torch.bfloat16 and soft.dtype == torch.float32


def test_tiny_pictures_with_minmax():
    Mixer(2, 0.0, 0.0, cutmix_minmax=(0.3, 0.4))(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), 0)


def test_mixer_follows_the_options():
    assert build_mixer(AugmentOptions(mixup=0.0, cutmix=0.0), 3) is None
    assert build_mixer(AugmentOptions(mixup_prob=0.0), 3) is None
    assert build_mixer(AugmentOptions(mixup=0.0, cutmix=0.0, cutmix_minmax=(0.2, 0.5)), 3)
    mixer = build_mixer(AugmentOptions(mixup=0.2, mixup_switch_prob=0.1, mixup_mode="pair"), 3)
    assert (mixer.mixup, mixer.switch_prob, mixer.mode, mixer.num_classes) == (0.2, 0.1, "pair", 3)
