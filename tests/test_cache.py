"""cache.py: the same batches from memory as from files."""

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cache
from augment import EvalTransform, Preprocessing, TrainTransform
from batch_augment import BatchAugment
from config import AugmentOptions, DataOptions
from datasets import ArraySource, ImageDataset, Source, build_dataset, build_loader
from errors import DataError, OptionError
from samplers import EvalSampler, RASampler, ShuffleSampler

CPU = torch.device("cpu")
SIDE = 16
PREPROCESSING = Preprocessing(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.2,) * 3)


@pytest.fixture
def pictures(tmp_path):
    """20 training and 9 validation pictures of 20×16 pixels in three classes."""
    rng = np.random.RandomState(0)
    for part, count in (("train", 20), ("val", 9)):
        for i in range(count):
            folder = tmp_path / part / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.randint(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def open_set(root, is_train=True, on_bad_image="error", **augment):
    options = DataOptions(data_path=str(root), on_bad_image=on_bad_image)
    transform = EvalTransform(PREPROCESSING).crop
    if is_train:
        transform = BatchAugment(PREPROCESSING, AugmentOptions(**augment), 3)
    return build_dataset(is_train, options, transform, seed=3)


def loader_of(dataset, sampler=None, num_workers=0):
    if sampler is None:
        sampler = ShuffleSampler(len(dataset)) if dataset.is_train else EvalSampler(len(dataset))
    return build_loader(
        dataset, sampler, batch_size=4, num_workers=num_workers, pin_memory=False,
        drop_last=dataset.is_train, seed=0,
    )  # fmt: skip


def seen(batch):
    """The pictures of ``batch`` as the model sees them, of the recipe of ``open_set``."""
    if batch.images.dtype != torch.uint8:
        return batch.images
    augment = BatchAugment(replace(PREPROCESSING, input_size=batch.images.shape[-1]),
                           AugmentOptions(), 3)  # fmt: skip
    return augment(batch.images, batch.plan)


def assert_same(batches, others):
    for left, right in itertools.zip_longest(batches, others):
        for name in ("targets", "indices", "positions"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
        assert torch.equal(seen(left), seen(right))
        assert left.bad == right.bad


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("where", ["auto", "ram"])
def test_small_pictures_leave_by_the_batch_and_are_the_same(pictures, is_train, where):
    plain = loader_of(open_set(pictures, is_train))
    cached = cache.apply(where, loader_of(open_set(pictures, is_train)), device=CPU)
    assert isinstance(cached, cache.CachedLoader)
    assert len(cached) == len(plain)
    for epoch in (0, 1):
        for loader in (plain, cached):
            if is_train:
                loader.sampler.set_epoch(epoch)
        assert_same(list(cached), list(plain))
    assert next(iter(cached)).images.dtype == torch.uint8


def test_repeated_augmentation_and_resuming_in_mid_epoch_are_the_same(pictures):
    loaders = []
    for _ in range(2):
        dataset = open_set(pictures)
        loaders.append(loader_of(dataset, RASampler(len(dataset))))
    cached = cache.apply("ram", loaders[1], device=CPU)
    whole = list(cached)
    assert_same(whole, list(loaders[0]))
    cached.sampler.set_epoch(0, 8)
    assert_same(list(cached), whole[2:])


@pytest.mark.parametrize("is_train", [True, False])
def test_unreadable_pictures_are_replaced_or_left_out_as_without_a_cache(pictures, is_train):
    part = "train" if is_train else "val"
    for name in ("class0/0.png", "class1/1.png", "class1/4.png"):
        (pictures / part / name).write_bytes(b"nothing")
    plain = loader_of(open_set(pictures, is_train, "skip"))
    cached = cache.apply("ram", loader_of(open_set(pictures, is_train, "skip")), device=CPU)
    batches, others = list(cached), list(plain)
    for left, right in zip(batches, others, strict=True):
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(seen(left), seen(right))
    # Two neighbours are bad: the plain loader names the second one too, where it was tried.
    assert {line for b in batches for line in b.bad} == {line for b in others for line in b.bad}
    with pytest.raises(DataError, match=r"class\d/\d.png.*--on-bad-image skip"):
        cache.apply("ram", loader_of(open_set(pictures, is_train)), device=CPU)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_large_pictures_are_kept_decoded(pictures, num_workers):
    """Where the crop isn't one of whole pixels, and where pictures differ in size."""
    large = Preprocessing(40, 1.0, "bicubic", (0.5,) * 3, (0.2,) * 3)

    def dataset():
        options = DataOptions(data_path=str(pictures))
        return build_dataset(True, options, BatchAugment(large, AugmentOptions(), 3), seed=3)

    plain = list(loader_of(dataset()))
    loader = cache.apply("ram", loader_of(dataset(), num_workers=num_workers), device=CPU)
    assert isinstance(loader.dataset.source, cache.MemorySource)
    for file in pictures.glob("train/*/*.png"):
        file.unlink()
    assert_same(list(loader), plain)


def test_pictures_augmented_one_by_one_are_kept_decoded(pictures):
    def dataset():
        options = DataOptions(data_path=str(pictures))
        return build_dataset(True, options, TrainTransform(PREPROCESSING, AugmentOptions()), seed=3)

    loader = cache.apply("ram", loader_of(dataset()), device=CPU)
    assert isinstance(loader.dataset.source, cache.MemorySource)
    assert_same(list(loader), list(loader_of(dataset())))


def test_pictures_of_different_sizes(pictures):
    Image.new("RGB", (30, 16)).save(pictures / "train/class0/other.png")
    loader = cache.apply("ram", loader_of(open_set(pictures)), device=CPU)
    assert isinstance(loader.dataset.source, cache.MemorySource)
    with pytest.raises(OptionError, match="one size: use ram"):
        cache.apply("device", loader_of(open_set(pictures)), device=CPU)


def test_device_needs_crops_of_whole_pixels(pictures):
    large = Preprocessing(40, 1.0, "bicubic", (0.5,) * 3, (0.2,) * 3)
    dataset = open_set(pictures)
    dataset.transform = BatchAugment(large, AugmentOptions(), 3)
    with pytest.raises(OptionError, match="--cache: device needs crops that move whole pixels"):
        cache.apply("device", loader_of(dataset), device=CPU)


def test_auto_leaves_alone_what_is_not_small(pictures):
    def result(dataset):
        loader = loader_of(dataset)
        return cache.apply("auto", loader, device=CPU) is loader

    assert not result(open_set(pictures))
    assert result(open_set(pictures, train_interpolation="random"))
    images = np.zeros((5, 200, 200, 3), dtype=np.uint8)
    large = ArraySource(images, [0] * 5, ["a"], "large")
    assert result(ImageDataset(large, open_set(pictures).transform, is_train=True))
    small = ArraySource(images[:, :90, :90], [0] * 5, ["a"], "small")
    assert not result(ImageDataset(small, open_set(pictures).transform, is_train=True))

    class Slow(Source):
        classes, targets = ["a"], np.zeros(5, dtype=np.int64)

    assert result(ImageDataset(Slow(), open_set(pictures).transform, is_train=True))
    assert cache.apply("none", loader := loader_of(open_set(pictures)), device=CPU) is loader


def test_a_set_that_does_not_fit_is_refused_before_it_is_read(pictures, monkeypatch):
    monkeypatch.setattr(cache, "available_memory", lambda: 20_000)
    with pytest.raises(OptionError, match=r"20 decoded pictures need about 0.0 GiB.*use none"):
        cache.apply("ram", loader_of(open_set(pictures)), device=CPU)


def test_memory_of_this_machine_is_known():
    assert cache.available_memory() > 1 << 28


def test_reading_is_silent_where_nobody_looks(pictures, caplog):
    with caplog.at_level(logging.WARNING):
        cache.apply("ram", loader_of(open_set(pictures)), device=CPU)
    assert not caplog.records
