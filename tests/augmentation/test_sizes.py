"""Images of another height than width: crops against timm's and torchvision's pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import MEAN, PLAIN, PREPROCESSING, STD, as_tensor
from plain_steps import prepared
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

from augmentation.batch import BatchAugment
from augmentation.policy import KINDS
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import EvalTransform, TrainTransform
from utils import seed_all

SIZES = [(90, 70), (50, 120), (37, 37), (200, 30)]  # width and height


def image_of(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def by_batch(preprocessing, options):
    return BatchAugment(preprocessing, options, 0)


def of_size(*size, **changes):
    return replace(PREPROCESSING, input_size=size, **changes)


def test_a_square_is_saved_as_one_number():
    assert of_size(64, 64) == PREPROCESSING and of_size(64, 64).to_dict()["input_size"] == 64
    values = of_size(48, 64).to_dict()
    assert values["input_size"] == [48, 64]
    assert Preprocessing.from_dict(values) == of_size(48, 64)
    assert of_size(48, 64).size == (48, 64)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("ratio", [0.875, 1.0, 1.2])
@pytest.mark.parametrize("input_size", [(48, 80), (70, 33)])
def test_evaluation_is_timms_and_the_steps_say_it(crop_mode, ratio, input_size, tmp_path):
    preprocessing = of_size(*input_size, crop_mode=crop_mode, crop_ratio=ratio)
    theirs = create_transform(
        input_size,
        crop_pct=ratio,
        crop_mode=crop_mode,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
    )
    for number, size in enumerate(SIZES):
        image = image_of(*size)
        expected = theirs(image)
        assert expected.shape == (3, *input_size)
        assert torch.equal(EvalTransform(preprocessing)(image), expected), size
        path = tmp_path / f"{number}.png"
        image.save(path)
        by_steps = prepared(path, preprocessing.steps())[0]
        assert np.abs(by_steps - expected.numpy()).max() < 1e-6, size


def test_the_random_resized_crop_is_timms():
    ours = TrainTransform(of_size(48, 80), replace(PLAIN, hflip=0.0))
    theirs = create_transform(
        (48, 80),
        is_training=True,
        interpolation="bicubic",
        hflip=0.0,
        color_jitter=None,
        mean=MEAN,
        std=STD,
    )
    for size in SIZES:
        seed_all(1)
        expected = theirs(image_of(*size))
        seed_all(1)
        assert torch.equal(ours(image_of(*size)), expected)


@pytest.mark.parametrize(("input_size", "padding"), [((48, 80), 4), ((24, 32), 3)])
def test_the_padded_crop_is_torchvisions(input_size, padding):
    """Of an image just around the input: ``--src``, and small inputs."""
    small = max(input_size) <= 32
    options = replace(PLAIN, hflip=0.0, src=not small)
    ours, batch = (make(of_size(*input_size), options) for make in (TrainTransform, by_batch))
    mode = {"padding_mode": "constant" if small else "reflect"}
    theirs = transforms.Compose(
        [
            ResizeKeepRatio(input_size, interpolation="bicubic"),
            transforms.RandomCrop(input_size, padding=padding, **mode),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    for size in SIZES:
        image = image_of(*size)
        seed_all(1)
        expected = theirs(image)
        seed_all(1)
        assert torch.equal(ours(image), expected), size
        # By the batch: the same from what is kept of the image as from the image.
        whole = batch.apply(as_tensor(image), 2, 5)
        kept = batch.padded(batch.keep(as_tensor(image))[None])
        taken = batch.take(kept, np.array([0]), 2, np.array([5]))[0]
        assert whole.shape == (3, *input_size) and torch.equal(whole, taken)


def test_erasing_and_translation_know_height_and_width():
    """Boxes reach over all of the image, and shifts are shares of the side they go along."""
    options = replace(PLAIN, reprob=1.0, aa="rand-m10-n3", hflip=0.0)
    augment = by_batch(of_size(40, 160), options)
    plan = augment.plan(0, np.arange(400))
    assert plan.boxes[..., 1].max() <= 40 and 140 < plan.boxes[..., 3].max() <= 160
    area = (plan.boxes[..., 1] - plan.boxes[..., 0]) * (plan.boxes[..., 3] - plan.boxes[..., 2])
    assert area.min() > 0.015 * 6400 and area.max() < 0.36 * 6400
    reach = {
        name: np.abs(plan.arguments[plan.kinds == KINDS.index(name)]).max()
        for name in ("translate_x", "translate_y")
    }
    assert reach == pytest.approx({"translate_x": 0.45 * 160, "translate_y": 0.45 * 40})
    images = torch.zeros(400, 3, 40, 160, dtype=torch.uint8)
    assert augment(images, plan).shape == images.shape
