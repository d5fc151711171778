"""pipeline/cache.py: the same batches from memory as from files."""

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import image_folder

from augmentation import windows
from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Transform
from augmentation.transforms import CentreCrop, EvalTransform, TrainTransform
from config import AugmentOptions, DataOptions
from errors import DataError, OptionError
from pipeline.cache import CachedLoader, apply_cache
from pipeline.dataset import ImageDataset, build_dataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.memory import MemorySource
from pipeline.sources.base import ArraySource, Source
from samplers import EvalSampler, RASampler, ShuffleSampler

CPU = torch.device("cpu")

SIDE = 16

CLASSES = ("class0", "class1", "class2")
PREPROCESSING = Preprocessing(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.2,) * 3)
LARGE = replace(PREPROCESSING, input_size=40)  # the crop doesn't move whole pixels


@pytest.fixture
def images(tmp_path):
    """21 training and 9 validation images of 20×16 pixels in three classes."""
    return image_folder(tmp_path, {"train": 7, "val": 3}, classes=CLASSES, size=(20, 16))


def open_set(
    root, is_train=True, on_bad_image="error", preprocessing=PREPROCESSING, **augment
) -> ImageDataset:
    """A part of the folder; training images are augmented by the batch."""
    data = DataOptions(data_path=str(root), on_bad_image=on_bad_image)
    transform: Transform = CentreCrop(preprocessing)
    if is_train:
        transform = BatchAugment(preprocessing, AugmentOptions(**augment), 3)
    return build_dataset(is_train, data, seed=3).with_transform(transform)


def loader_of(dataset, sampler=None, num_workers=0) -> Loader:
    if sampler is None:
        sampler = ShuffleSampler(len(dataset)) if dataset.is_train else EvalSampler(len(dataset))
    return Loader(
        dataset,
        sampler,
        LoaderSettings(batch_size=4, num_workers=num_workers, drop_last=dataset.is_train),
    )


def seen(batch):
    """The images of ``batch`` as the model sees them, of the recipe of ``open_set``."""
    if batch.images.dtype != torch.uint8:
        return batch.images
    preprocessing = replace(PREPROCESSING, input_size=batch.images.shape[-1])
    augment = BatchAugment(preprocessing, AugmentOptions(), 3)
    return augment(batch.images, batch.plan)


def assert_same(batches, others):
    for left, right in itertools.zip_longest(batches, others):
        for name in ("targets", "indices", "positions"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
        assert torch.equal(seen(left), seen(right))
        assert left.bad == right.bad


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("where", ["auto", "ram"])
def test_small_images_leave_by_the_batch_and_are_the_same(images, is_train, where):
    plain = loader_of(open_set(images, is_train))
    cached = apply_cache(where, loader_of(open_set(images, is_train)), device=CPU)
    assert isinstance(cached, CachedLoader)
    assert len(cached) == len(plain)
    for epoch in (0, 1):
        for loader in (plain, cached):
            if is_train:
                loader.sampler.set_epoch(epoch)
        assert_same(list(cached), list(plain))
    assert next(iter(cached)).images.dtype == torch.uint8


def test_repeated_augmentation_and_resuming_in_mid_epoch_are_the_same(images):
    loaders = []
    for _ in range(2):
        dataset = open_set(images)
        loaders.append(loader_of(dataset, RASampler(len(dataset))))
    cached = apply_cache("ram", loaders[1], device=CPU)
    whole = list(cached)
    assert_same(whole, list(loaders[0]))
    cached.sampler.set_epoch(0, 8)
    assert_same(list(cached), whole[2:])


@pytest.mark.parametrize("is_train", [True, False])
def test_unreadable_images_are_replaced_or_left_out_as_without_a_cache(images, is_train):
    part = "train" if is_train else "val"
    for name in ("class0/0.png", "class0/1.png", "class1/4.png"):
        (images / part / name).write_bytes(b"nothing")
    plain = loader_of(open_set(images, is_train, "skip"))
    cached = apply_cache("ram", loader_of(open_set(images, is_train, "skip")), device=CPU)
    batches, others = list(cached), list(plain)
    for left, right in zip(batches, others, strict=True):
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(seen(left), seen(right))
    # Two neighbours are bad: the plain loader names the second one too, where it was tried.
    assert {line for b in batches for line in b.bad} == {line for b in others for line in b.bad}
    with pytest.raises(DataError, match=r"class\d/\d.png.*--on-bad-image skip"):
        apply_cache("ram", loader_of(open_set(images, is_train)), device=CPU)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_large_images_are_kept_decoded(images, num_workers):
    """Where the crop isn't one of whole pixels."""
    plain = list(loader_of(open_set(images, preprocessing=LARGE)))
    loader = loader_of(open_set(images, preprocessing=LARGE), num_workers=num_workers)
    cached = apply_cache("ram", loader, device=CPU)
    assert isinstance(cached.dataset.source, MemorySource)
    for file in images.glob("train/*/*.png"):
        file.unlink()
    assert_same(list(cached), plain)


@pytest.mark.parametrize(
    "transform", [TrainTransform(PREPROCESSING, AugmentOptions(), 3), EvalTransform(PREPROCESSING)]
)
def test_images_that_are_made_one_by_one_are_kept_decoded(images, transform):
    dataset = open_set(images).with_transform(transform)
    plain = loader_of(dataset)
    cached = apply_cache("ram", plain, device=CPU)
    assert isinstance(cached.dataset.source, MemorySource)
    assert dataset.source is plain.dataset.source is not cached.dataset.source
    assert_same(list(cached), list(plain))


@pytest.mark.parametrize("alike", [True, False])
def test_narrow_images_are_kept_as_they_are(alike, tmp_path, monkeypatch):
    """Those that would grow huge; also where all of a set are."""
    monkeypatch.setattr(windows, "MOST_PIXELS", SIDE * 200)
    for part in ("train", "val"):
        for i in range(6):
            size = (300, 2) if alike or i == 4 else (20, SIDE)
            path = tmp_path / part / CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 60).convert("RGB").save(path)
    for is_train in (True, False):
        plain = loader_of(open_set(tmp_path, is_train))
        cached = apply_cache("ram", loader_of(open_set(tmp_path, is_train)), device=CPU)
        if is_train:
            assert isinstance(cached.dataset.source, MemorySource)
            widest = max(image[1] for image in cached.dataset.source.shapes.tolist())
            assert widest == 300
        for left, right in zip(cached, plain, strict=True):
            assert torch.equal(left.indices, right.indices)
            assert torch.equal(seen(left), seen(right))


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, LARGE])
@pytest.mark.parametrize("is_train", [True, False])
def test_transparent_images_are_kept_on_the_background(preprocessing, is_train, tmp_path):
    for part in ("train", "val"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                image = Image.effect_noise((20, 16), 60).convert("RGB")
                image.putalpha(Image.effect_noise((20, 16), 90))
                image.save(tmp_path / part / name / f"{i}.png")
    batches = []
    for background in ("navy", "drop"):
        values = replace(preprocessing, background=background)
        plain = list(loader_of(open_set(tmp_path, is_train, preprocessing=values)))
        dataset = open_set(tmp_path, is_train, preprocessing=values)
        cached = list(apply_cache("ram", loader_of(dataset), device=CPU))
        for left, right in zip(cached, plain, strict=True):
            assert torch.equal(seen(left), seen(right))
        batches.append(seen(plain[0]))
    assert not torch.equal(*batches)


def test_images_of_different_sizes(images):
    Image.new("RGB", (30, 16)).save(images / "train/class0/other.png")
    loader = apply_cache("ram", loader_of(open_set(images)), device=CPU)
    assert isinstance(loader.dataset.source, MemorySource)
    with pytest.raises(OptionError, match="one size: use ram"):
        apply_cache("device", loader_of(open_set(images)), device=CPU)


def test_device_needs_crops_of_whole_pixels(images):
    dataset = open_set(images, preprocessing=LARGE)
    with pytest.raises(OptionError, match="--cache: device needs crops that move whole pixels"):
        apply_cache("device", loader_of(dataset), device=CPU)


def test_auto_leaves_alone_what_is_not_small(images):
    def left_alone(dataset):
        loader = loader_of(dataset)
        return apply_cache("auto", loader, device=CPU) is loader

    assert not left_alone(open_set(images))
    assert left_alone(open_set(images, train_interpolation="random"))
    transform = open_set(images).transform
    arrays = np.zeros((5, 200, 200, 3), dtype=np.uint8)
    large = ArraySource(arrays, [0] * 5, ["a"], "large")
    assert left_alone(ImageDataset(large, transform, is_train=True))
    small = ArraySource(arrays[:, :90, :90], [0] * 5, ["a"], "small")
    assert not left_alone(ImageDataset(small, transform, is_train=True))

    class Slow(Source):
        classes, targets = ["a"], np.zeros(5, dtype=np.int64)

    assert left_alone(ImageDataset(Slow(), transform, is_train=True))


def test_none_leaves_the_loader_alone(images):
    loader = loader_of(open_set(images))
    assert apply_cache("none", loader, device=CPU) is loader


def test_loaders_say_where_images_come_from(images):
    plain = loader_of(open_set(images), num_workers=2)
    assert plain.introduction().startswith("2 workers")
    assert not plain.cached and not plain.from_store
    # 21 images of 20×16 pixels; decoded, and with two pixels on each side.
    one_by_one = open_set(images).with_transform(EvalTransform(PREPROCESSING))
    decoded = apply_cache("ram", loader_of(one_by_one), device=CPU)
    mib = 21 * 3 * 20 * 16 / 2**20
    assert decoded.introduction() == f"0 workers, {mib:.1f} MiB of images in ram"
    assert decoded.cached and not decoded.from_store
    cached = apply_cache("ram", loader_of(open_set(images)), device=CPU)
    mib = 21 * 3 * 24 * 20 / 2**20
    assert cached.introduction() == f"{mib:.1f} MiB of images in memory of cpu"
    assert cached.cached and cached.from_store


def test_reading_is_silent_where_nobody_looks(images, caplog):
    with caplog.at_level(logging.WARNING):
        apply_cache("ram", loader_of(open_set(images)), device=CPU)
    assert not caplog.records
