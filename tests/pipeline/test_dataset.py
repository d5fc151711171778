"""pipeline/dataset.py: what an image depends on, unreadable images, the counts of classes."""

import errno
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import image_folder
from tiny_sets import EVAL, SMALL, array_set, load, noise, open_set, save, train_transform

from augmentation.batch import BatchAugment
from augmentation.protocol import Transform
from augmentation.transforms import build_transform
from config import AugmentOptions, DataOptions
from errors import DataError
from pipeline.dataset import ImageDataset, Sample, build_dataset, collate, summarise_classes
from pipeline.limits import limit_pixels, most_pixels
from pipeline.sources.base import ArraySource, Source
from samplers import EvalSampler, SampleKey, ShuffleSampler
from utils import derive_seed, seed_all


def test_augmentation_is_seeded_by_seed_epoch_and_position():
    dataset = array_set()
    image = dataset[SampleKey(4, 7, 9)].image
    seed_all(derive_seed(3, "sample", 7, 9))
    assert torch.equal(image, train_transform()(Image.fromarray(noise(4))))
    for key in (SampleKey(4, 8, 9), SampleKey(4, 7, 10)):
        assert not torch.equal(dataset[key].image, image)
    assert not torch.equal(
        array_set(transform=train_transform(seed=4))[SampleKey(4, 7, 9)].image, image
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_process_generators_alone(num_workers):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    load(array_set(), ShuffleSampler(13), num_workers)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_resplit_leaves_every_third_position_unerased():
    always = AugmentOptions(aa=None, color_jitter=None, reprob=1.0, remode="const", resplit=True)
    source = ArraySource(np.full((1, 16, 16), 255, np.uint8), [0], ["white"], "white")
    transform = build_transform(True, replace(SMALL, input_size=40), always)
    dataset = ImageDataset(source, transform, is_train=True)
    erased = [bool((dataset[SampleKey(0, 0, p)].image != 1).any()) for p in range(7)]
    assert erased == [False, True, True, False, True, True, False]


@pytest.fixture
def spoilt(tmp_path):
    """Six images of which numbers 1, 2 and 5 can't be read."""
    for i in range(6):
        save(tmp_path / "train" / "ab"[i // 3] / f"{i}.png", seed=i)
        save(tmp_path / "val" / "ab"[i // 3] / f"{i}.png", seed=i)
    for part in ("train", "val"):
        for name in ("a/1.png", "a/2.png", "b/5.png"):
            (tmp_path / part / name).write_text("oops")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_bad_image_stops_with_its_name(spoilt, num_workers, is_train):
    dataset = open_set("IMNET", spoilt, is_train)
    with pytest.raises(DataError, match=r"a/1\.png: not an image.*--on-bad-image skip"):
        load(dataset, EvalSampler(6), num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_replaces_bad_images(spoilt, num_workers):
    dataset = open_set("IMNET", spoilt, on_bad_image="skip")
    batch = load(dataset, EvalSampler(6), num_workers, batch_size=6)[0]
    assert batch.indices.tolist() == [0, 3, 3, 3, 4, 0]
    assert batch.targets.tolist() == [0, 1, 1, 1, 1, 0]
    assert batch.positions.tolist() == list(range(6))
    assert [line.split(": ")[0][-7:] for line in batch.bad] == [
        "a/1.png",
        "a/2.png",
        "a/2.png",
        "b/5.png",
    ]


def test_an_image_that_needs_too_much_memory_is_bad(monkeypatch):
    """Whether it is Python or PyTorch that says so, and wherever in the transform."""

    class Greedy(Transform):
        def apply(self, image, epoch, position):
            if position == 3:
                raise MemoryError
            return torch.empty(1 << 60) if position == 5 else EVAL.apply(image, epoch, position)

    greedy = array_set(8, transform=Greedy())
    dataset = ImageDataset(greedy.source, greedy.transform, on_bad_image="skip")
    [batch] = load(dataset, EvalSampler(8), batch_size=8)
    assert batch.indices.tolist() == [0, 1, 2, 4, 6, 7]
    reasons = [line.partition(": ")[2] for line in batch.bad]
    assert reasons == ["needs more memory than there is"] * 2


def test_transparent_images_are_decoded_on_the_transforms_background():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))

    class One(Source):
        classes, targets = ["a"], np.zeros(1, dtype=np.int64)

        def open(self, index):
            return image

    for background, red, blue in (("navy", 0, 128), ("drop", 255, 0)):
        values = replace(SMALL, background=background, mean=(0.0,) * 3, std=(1.0,) * 3)
        for train in (False, True):
            transform = build_transform(train, values, AugmentOptions(aa=None, color_jitter=0))
            batch = BatchAugment(values, AugmentOptions(aa=None, color_jitter=0), 0)
            for chosen, scale in ((transform, 255), (batch, 1)):
                pixels = ImageDataset(One(), chosen, is_train=train)[0].image * scale
                assert pixels[:, 8, 8].round().tolist() == [red, 0, blue], (background, train)


def test_evaluation_leaves_bad_images_out(spoilt):
    dataset = open_set("IMNET", spoilt, is_train=False, on_bad_image="skip")
    batches = load(dataset, EvalSampler(6), batch_size=1)
    assert [b.indices.tolist() for b in batches] == [[0], [], [], [3], [4], []]
    assert batches[1].images.shape == (0, 3, 0, 0) and batches[1].targets.dtype == torch.int64
    assert [len(b.bad) for b in batches] == [0, 1, 1, 0, 0, 1]
    whole = load(dataset, EvalSampler(6), batch_size=6)[0]
    assert whole.indices.tolist() == [0, 3, 4] and len(whole.bad) == 3


def test_a_set_without_any_readable_image_stops(spoilt):
    dataset = open_set("IMNET", spoilt, on_bad_image="skip").subset([1, 2, 5])
    with pytest.raises(DataError, match=r"a/1\.png"):
        load(dataset, EvalSampler(3))


class Failing(Source):
    """Reading fails with an error of the operating system."""

    classes = ["a"]
    targets = np.zeros(4, np.int64)

    def __init__(self, code):
        self.code = code

    def open(self, index):
        raise OSError(self.code, os.strerror(self.code))

    def sample_id(self, index):
        return f"x{index}"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_fault_of_an_image(num_workers, code):
    """No image is skipped for it."""
    dataset = ImageDataset(Failing(code), EVAL, is_train=True, on_bad_image="skip")
    with pytest.raises(DataError, match=r"^Too many open files[^\n]* \(.*ulimit -n"):
        load(dataset, EvalSampler(4), num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanished_or_may_not_be_read_is_named(tmp_path, num_workers):
    for i in range(2):
        save(tmp_path / "train" / "a" / f"{i}.png")
    dataset = open_set("IMNET", tmp_path / "train", val_fraction=0.5)
    Path(dataset.sample_id(0)).unlink()
    with pytest.raises(DataError, match=r"\.png: No such file or directory \(it isn't"):
        load(dataset, EvalSampler(1), num_workers)
    with pytest.raises(DataError, match=r"x0: .*Input/output error.*--on-bad-image skip"):
        load(ImageDataset(Failing(errno.EIO), EVAL), EvalSampler(4), num_workers)


def test_class_summary():
    def of(counts):
        targets = np.repeat(np.arange(len(counts)), counts)
        names = [chr(ord("a") + i) for i in range(len(counts))]
        source = ArraySource(np.zeros((len(targets), 8, 8), np.uint8), targets, names, "x")
        return summarise_classes(ImageDataset(source, EVAL))

    counts, lines = of([5, 7, 9])
    assert counts.tolist() == [5, 7, 9]
    assert lines == ["images per class: a 5, b 7, c 9"]
    assert of([5] * 20 + [9])[1] == ["images per class: 5 (a) to 9 (u)"]
    assert "warning: the most frequent class has 10 times" in of([5, 50, 5])[1][1]
    assert len(of([5, 49, 5])[1]) == 1
    assert of([5, 0, 5])[1][1] == "warning: no images of 1 classes: b"


def test_a_batch_of_decoded_images_keeps_the_order_of_their_bytes():
    by_pixel = [torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8).permute(2, 0, 1)] * 2
    for images, stride in ((by_pixel, 1), ([by_pixel[0], by_pixel[1].contiguous()], 30)):
        batch = collate([Sample(image, 0, 0, 0, 0, []) for image in images]).images
        assert torch.equal(batch, torch.stack([image.contiguous() for image in images]))
        assert batch.stride(1) == stride


def test_changes_give_new_data_sets():
    """Nothing of the first one changes, what it has given up included."""
    first = array_set(6, transform=EVAL)
    first.given_up[0] = "damaged"
    other = first.with_transform(train_transform())
    assert first.transform is EVAL and other.source is first.source
    part = first.subset([0, 1])
    assert len(first) == 6 and len(part) == 2 and part.transform is EVAL
    for dataset in (other, part, first.with_source(part.source)):
        assert dataset.is_train == first.is_train
        assert not dataset.given_up
        assert dataset[0].image is not None
    assert first[0].image is None and first[0].bad == ["arrays#0: damaged"]


class Late(Transform):
    """Shows what a transform gets, and leaves a plan."""

    decode_as = "tensor"

    def apply(self, image, epoch, position):
        assert image.dtype == torch.uint8 and image.shape == (3, 20, 24)
        return torch.full((3, 2, 2), 100.0 * epoch + position)

    def plan(self, epoch, positions):
        return epoch, positions.tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_transforms_of_ones_own(num_workers):
    """All that the data set and the loader ask of a transform is in the protocol."""
    sampler = ShuffleSampler(13, seed=1)
    sampler.set_epoch(2)
    batches = load(array_set(transform=Late()), sampler, num_workers)
    assert [b.images[:, 0, 0, 0].tolist() for b in batches[:2]] == [
        [200.0, 201.0, 202.0, 203.0],
        [204.0, 205.0, 206.0, 207.0],
    ]
    assert [b.plan for b in batches[:2]] == [(2, [0, 1, 2, 3]), (2, [4, 5, 6, 7])]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_reaches_the_process_and_workers_that_are_not_forked(tmp_path):
    root = image_folder(tmp_path, {"train": 2, "val": 1})
    Image.new("RGB", (20, 20)).save(root / "train/amber/0.png")
    usual = most_pixels()
    try:
        for most, bad in ((400, []), (399, ["400 pixels: more than the limit of 399 pixels"])):
            data = DataOptions(data_set="IMNET", data_path=str(root), max_image_pixels=most)
            dataset = build_dataset(True, data, seed=0).with_transform(EVAL)
            assert most_pixels() == most
            sent = pickle.dumps(dataset)
            limit_pixels(10**9)
            received = pickle.loads(sent)  # as a spawned worker
            assert most_pixels() == most
            found = received[0].bad
            assert len(found) == len(bad)
            assert all(text in line for text, line in zip(bad, found, strict=True))
    finally:
        limit_pixels(usual)
