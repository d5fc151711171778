"""augmentation/mixing.py, against timm's Mixup."""

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup

from augmentation.mixing import Mixer, build_mixer
from config import AugmentOptions

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
        # Image i is constant i, so the mean of the mixed image shows its shares.
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


def test_tiny_images_with_minmax():
    Mixer(2, 0.0, 0.0, cutmix_minmax=(0.3, 0.4))(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), 0)


def test_mixer_follows_the_options():
    assert build_mixer(AugmentOptions(mixup=0.0, cutmix=0.0), 3) is None
    assert build_mixer(AugmentOptions(mixup_prob=0.0), 3) is None
    assert build_mixer(AugmentOptions(mixup=0.0, cutmix=0.0, cutmix_minmax=(0.2, 0.5)), 3)
    mixer = build_mixer(AugmentOptions(mixup=0.2, mixup_switch_prob=0.1, mixup_mode="pair"), 3)
    assert (mixer.mixup, mixer.switch_prob, mixer.mode, mixer.num_classes) == (0.2, 0.1, "pair", 3)


def test_drawing_and_applying_are_apart():
    """The images show the boxes that were drawn, the targets their share."""
    mixer = Mixer(2, mixup=0.0, cutmix=1.0, mode="elem")
    images = torch.stack([torch.zeros(3, 20, 16), torch.ones(3, 20, 16)])
    for seed in range(20):
        mix = mixer.draw(2, 20, 16, seed)
        mixed, soft = mixer(images, torch.tensor([0, 1]), seed)
        for i, (y0, y1, x0, x1) in enumerate(mix.boxes.tolist()):
            expected = images[i].clone()
            expected[:, y0:y1, x0:x1] = images[1 - i][:, y0:y1, x0:x1]
            assert torch.equal(mixed[i], expected)
            own = 1 - (y1 - y0) * (x1 - x0) / 320
            assert mix.lam[i] == pytest.approx(own) and float(soft[i, i]) == pytest.approx(own)


def test_vectors_of_labels_mix_as_classes_do():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 3, 1, 1, 2])
    for mode in ("batch", "pair", "elem"):
        mixer = Mixer(4, 0.8, 1.0, mode=mode)
        of_classes, soft = mixer(images, classes, 7)
        vectors = torch.nn.functional.one_hot(classes, 4).float()
        of_vectors, mixed = mixer(images, vectors, 7)
        assert torch.equal(of_classes, of_vectors) and torch.equal(soft, mixed)
        # Of two labels each; an image without any has those of its partner alone.
        both = mixer(images, vectors + vectors.roll(1, 1), 7)[1]
        torch.testing.assert_close(both, soft + soft.roll(1, 1))
        none = mixer(images, torch.zeros(5, 4, dtype=torch.uint8), 7)[1]
        assert none.dtype == torch.float32 and not none.any()
