"""augmentation/transforms.py, one image at a time, against timm and torchvision.

Also of augmentation/preprocessing.py.
"""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from plain_steps import prepared
from timm.data import create_transform

from augmentation.batch import build_train_transform
from augmentation.preprocessing import Preprocessing
from augmentation.steps import ThreeAugment, build_policy
from augmentation.transforms import (
    CentreCrop,
    EvalTransform,
    TrainTransform,
    build_transform,
)
from config import AugmentOptions
from errors import CheckpointError, OptionError
from pipeline.decoding import decode
from utils import derive_seed, seed_all

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PREPROCESSING = Preprocessing(64, 0.875, "bicubic", MEAN, STD)

PLAIN = AugmentOptions(aa=None, color_jitter=None, hflip=0.0, reprob=0.0)


def make_image(width=90, height=70, seed=0):
    coarse = np.random.RandomState(seed).randint(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def timm_transform(**changes):
    options = {
        "input_size": 64,
        "is_training": True,
        "color_jitter": 0.3,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "interpolation": "bicubic",
        "re_prob": 0.25,
        "re_mode": "pixel",
        "re_count": 1,
        "mean": MEAN,
        "std": STD,
    }
    return create_transform(**{**options, **changes})


# --- preprocessing --------------------------------------------------------------------------------


def test_preprocessing_survives_plain_values():
    values = PREPROCESSING.to_dict()
    assert {type(v) for v in values.values()} == {int, float, str, list}
    assert Preprocessing.from_dict(values) == PREPROCESSING


def test_fields_of_another_version_are_named_in_one_line():
    with pytest.raises(CheckpointError, match="has a.nb, c, which this version doesn't know") as e:
        Preprocessing.from_dict(PREPROCESSING.to_dict() | {"c": 1, "a\nb": 2})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("size", [(90, 70), (50, 120), (73, 73)])
@pytest.mark.parametrize(("input_size", "ratio"), [(64, 0.875), (56, 0.9), (48, 1.0)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_timms(size, input_size, ratio, interpolation):
    image = make_image(*size)
    ours = EvalTransform(Preprocessing(input_size, ratio, interpolation, MEAN, STD))
    theirs = create_transform(
        input_size, crop_pct=ratio, interpolation=interpolation, mean=MEAN, std=STD
    )
    assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("size", [(90, 70), (50, 120), (73, 73), (20, 400)])
@pytest.mark.parametrize("ratio", [0.875, 0.95, 1.0, 1.15])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_crop_modes_are_timms(size, ratio, crop_mode):
    image = make_image(*size)
    ours = EvalTransform(Preprocessing(64, ratio, "bilinear", MEAN, STD, crop_mode))
    theirs = create_transform(
        64, crop_pct=ratio, crop_mode=crop_mode, interpolation="bilinear", mean=MEAN, std=STD
    )
    assert torch.equal(ours(image), theirs(image))
    # The service's processes, and loaders' that aren't forked, get it pickled.
    assert torch.equal(pickle.loads(pickle.dumps(ours))(image), theirs(image))


def test_preprocessing_of_older_checkpoints_cuts_out_the_centre():
    values = replace(PREPROCESSING, crop_mode="squash").to_dict()
    assert Preprocessing.from_dict(values).crop_mode == "squash"
    del values["crop_mode"]
    assert Preprocessing.from_dict(values) == PREPROCESSING


def test_small_inputs_of_older_checkpoints_keep_the_whole_image():
    """Their crop ratio was written and never used."""
    small = Preprocessing(32, 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3).to_dict()
    assert Preprocessing.from_dict(small).crop_ratio == 0.875
    del small["crop_mode"]
    transform = EvalTransform(Preprocessing.from_dict(small))
    image = make_image(32, 32)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(transform(image), expected)
    assert transform(make_image(8, 8)).shape == (3, 32, 32)
    assert transform(make_image(8, 20)).shape == (3, 32, 32)


@pytest.mark.parametrize("background", ["white", "#204060", "drop"])
@pytest.mark.parametrize("size", [(90, 70), (50, 121), (20, 20), (200, 3)])
@pytest.mark.parametrize("ratio", [0.875, 1.0, 1.2])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_steps_are_what_is_done(size, ratio, crop_mode, background, tmp_path):
    """Done anew with Pillow and NumPy alone, from what exported files say."""
    values = Preprocessing(64, ratio, "bicubic", MEAN, STD, crop_mode, background)
    image = make_image(*size)
    image.putalpha(make_image(*size, seed=1).getchannel("R"))
    image.save(tmp_path / "image.png")
    steps = json.loads(json.dumps(values.exported()))["steps"]
    expected = prepared(tmp_path / "image.png", steps)[0]
    given = EvalTransform(values)(decode(tmp_path / "image.png", background))
    # Pillow's two ways to composite round differently.
    assert np.abs(given.numpy() - expected).max() <= 1.01 / 255 / min(STD)
    assert Preprocessing.from_dict(values.exported()) == values


def test_what_older_checkpoints_did_with_transparency_stays():
    values = PREPROCESSING.to_dict()
    assert values["background"] == "white"
    assert Preprocessing.from_dict(values | {"background": "navy"}).background == "navy"
    del values["background"]
    assert Preprocessing.from_dict(values).background == "drop"
    with pytest.raises(OptionError, match="--background: 'whit' is no colour"):
        replace(PREPROCESSING, background="whit")


@pytest.mark.parametrize("is_train", [True, False])
def test_every_transform_has_the_background(is_train):
    values = replace(PREPROCESSING, background="navy")
    options = replace(AugmentOptions(), augment_on="cpu")
    transforms = [build_transform(is_train, values, options), CentreCrop(values)]
    transforms += [build_train_transform(values, o, 0) for o in (options, AugmentOptions())]
    assert [transform.background for transform in transforms] == ["navy"] * 4


# --- training -------------------------------------------------------------------------------------


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
        (
            {"aa": None, "color_jitter": (0.4, 0.0, 0.2, 0.1), "color_jitter_prob": 0.6},
            {"auto_augment": None, "color_jitter": (0.4, 0.0, 0.2, 0.1), "color_jitter_prob": 0.6},
        ),
        (
            {"grayscale_prob": 0.3, "blur_prob": 0.5},
            {"grayscale_prob": 0.3, "gaussian_blur_prob": 0.5},
        ),
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
        image = make_image(seed=seed)
        seed_all(seed)
        expected = reference(image)
        seed_all(seed)
        assert torch.equal(mine(image), expected), f"seed {seed}"


def test_simple_random_crop_shows_the_short_side_whole():
    """--src: resized to the input size, padded by 4 in reflection, cropped."""
    transform = TrainTransform(
        Preprocessing(64, 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3), replace(PLAIN, src=True)
    )
    image = make_image(128, 64)
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
    assert transform(make_image(3 * size, 2 * size)).shape == (3, size, size)


def test_three_augment_takes_each_operation_equally_often():
    image = make_image(24, 24)
    grey, solarised = ThreeAugment.grey(image), ImageOps.solarize(image)
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    for _ in range(900):
        out = ThreeAugment()(image)
        counts["grey" if out == grey else "solarised" if out == solarised else "blurred"] += 1
    # 900 draws of a third: the std is 14
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


def test_three_augment_erases_nothing():
    """DeiT's ``new_data_aug_generator`` ends with the normalisation."""
    options = AugmentOptions(ThreeAugment=True, reprob=1.0, remode="const")
    transform = TrainTransform(PREPROCESSING, options)
    without = TrainTransform(PREPROCESSING, replace(options, reprob=0.0))
    for position in range(8):
        image = make_image(seed=position)
        expected = without.apply(image, 0, position)
        assert torch.equal(transform.apply(image, 0, position), expected)


def test_first_copy_can_stay_unerased():
    transform = TrainTransform(PREPROCESSING, replace(PLAIN, reprob=1.0, resplit=True))
    untouched = TrainTransform(PREPROCESSING, PLAIN)
    image = make_image()
    seed_all(1)
    expected = untouched(image)
    seed_all(1)
    assert torch.equal(transform(image, erase=False), expected)
    seed_all(1)
    assert not torch.equal(transform(image), expected)
    assert transform.resplit


@pytest.mark.parametrize(
    "name",
    [
        "rand",
        "rand-m9-mstd0.5-inc1",
        "rand-m7-n3-p0.5-mmax10",
        "rand-tweights",
        "augmix",
        "v0",
        "v0r",
        "original",
        "originalr",
        "3a",
        "trivial",
    ],
)
def test_policies_work(name):
    policy = build_policy(name, PREPROCESSING, "random")
    outputs = [policy(make_image()) for _ in range(8)]
    assert all(out.size == (90, 70) and out.mode == "RGB" for out in outputs)
    assert any(out != make_image() for out in outputs)


@pytest.mark.parametrize(
    "name",
    ["rnd-m9", "rand-x3", "rand-inc", "rand-m", "rand m9", "", "augmix-n2", "v1", "rand-tfoo"],
)
def test_unknown_policies_are_refused(name):
    with pytest.raises(OptionError, match="--aa: .*rand-m9"):
        build_policy(name, PREPROCESSING, "bicubic")


# --- the protocol -------------------------------------------------------------------------------


def test_training_is_seeded_by_seed_epoch_and_position():
    transform = build_transform(True, PREPROCESSING, AugmentOptions(), seed=5)
    image = make_image()
    before = torch.get_rng_state()
    result = transform.apply(image, 2, 31)
    assert torch.equal(torch.get_rng_state(), before)
    seed_all(derive_seed(5, "sample", 2, 31))
    assert torch.equal(result, transform(image))
    others = [(5, 3, 31), (5, 2, 32), (6, 2, 31)]
    for seed, epoch, position in others:
        other = build_transform(True, PREPROCESSING, AugmentOptions(), seed=seed)
        assert not torch.equal(other.apply(image, epoch, position), result)


def test_only_the_first_copy_stays_unerased():
    always = replace(PLAIN, reprob=1.0, remode="const", resplit=True)
    transform = TrainTransform(PREPROCESSING, always)
    plain = TrainTransform(PREPROCESSING, PLAIN)
    same = [
        torch.equal(transform.apply(make_image(), 0, p), plain.apply(make_image(), 0, p))
        for p in range(6)
    ]
    assert same == [True, False, False, True, False, False]


def test_one_by_one_leaves_nothing_to_do():
    """For the batch, and for a store."""
    for is_train in (True, False):
        transform = build_transform(is_train, PREPROCESSING, AugmentOptions())
        assert transform.decode_as == "PIL" and not transform.by_batch
        assert transform.plan(0, np.arange(3)) is None
        assert transform.for_store() is None


@pytest.mark.parametrize("input_size", [64, 32])
def test_centre_crop_is_the_image_that_evaluation_normalises(input_size):
    preprocessing = replace(PREPROCESSING, input_size=input_size)
    crop, whole = CentreCrop(preprocessing), EvalTransform(preprocessing)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images = [make_image(seed=seed) for seed in range(4)]
    for image in images:
        pixels = crop.apply(image, 0, 0)
        assert pixels.dtype == torch.uint8
        torch.testing.assert_close(whole.apply(image, 0, 0), (pixels / 255 - mean) / std)
    store = crop.for_store()
    kept = store.padded(torch.stack([store.keep(image) for image in images]))
    taken = store.take(kept, np.array([2, 0]), 7, np.array([10, 11]))
    assert torch.equal(taken[0], crop.apply(images[2], 0, 0))
    assert torch.equal(taken[1], crop.apply(images[0], 0, 0))
    assert store.plan(0, np.arange(2)) is None
