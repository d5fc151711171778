"""datasets.py: small real files of every kind, and loaders that agree whatever the worker count."""

import csv
import gzip
import io
import json
import logging
import os
import pickle
import random
import signal
import sys
import tarfile
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from augment import Preprocessing
from config import AugmentOptions, DataOptions
from datasets import (
    ArraySource,
    BadPictureError,
    ImageDataset,
    INatDataset,
    build_dataset,
    build_loader,
    build_transform,
    decode,
    default_normalization,
    register_dataset,
    stratified_split,
    summarise_classes,
)
from errors import DataError, OptionError
from samplers import EvalSampler, RASampler, SampleKey, ShuffleSampler
from utils import derive_seed, seed_all

SMALL = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
AUGMENT = AugmentOptions(scale=(0.3, 1.0))
TRAIN, EVAL = (build_transform(is_train, SMALL, AUGMENT) for is_train in (True, False))


def noise(seed, height=20, width=24):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, seed=0, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path, **kwargs)
    return path


def open_set(name, path, is_train=True, transform=EVAL, seed=0, **options):
    options = DataOptions(data_set=name, data_path=str(path), **options)
    return build_dataset(is_train, options, transform, seed=seed)


def array_set(count=13, is_train=True, transform=TRAIN, seed=3):
    images = np.stack([noise(i) for i in range(count)])
    source = ArraySource(images, np.arange(count) % 3, ["a", "b", "c"], "arrays")
    return ImageDataset(source, transform, seed=seed, is_train=is_train)


def load(dataset, sampler, num_workers=0, batch_size=4, drop_last=False):
    loader = build_loader(
        dataset, sampler, batch_size=batch_size, num_workers=num_workers, pin_memory=True,
        drop_last=drop_last, seed=0,
    )  # fmt: skip
    batches = list(loader)
    assert len(loader) == len(batches)
    return batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for mine, theirs in zip(batch, other, strict=True):
            assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs


# --- pictures -----------------------------------------------------------------------------------


def test_modes_become_rgb(tmp_path):
    rgb = Image.fromarray(noise(0))
    for mode in ("RGB", "RGBA", "LA", "L", "1", "P"):
        path = tmp_path / f"{mode}.png"
        rgb.convert(mode).save(path)
        expected = rgb.convert(mode).convert("RGB")
        assert np.array_equal(decode(path), expected), mode
    cmyk = tmp_path / "cmyk.jpg"
    rgb.convert("CMYK").save(cmyk)
    assert decode(cmyk).mode == "RGB"


@pytest.mark.filterwarnings("error")
def test_palette_with_transparent_bytes(tmp_path):
    image = Image.fromarray(noise(0)).quantize(4)
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255, 255]))
    assert np.array_equal(decode(tmp_path / "p.png"), image.convert("RGB"))


def test_deep_greys_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray((ramp / 257).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(ramp // 256).save(tmp_path / "dark.png")
    for name in ("16.png", "32.tif", "unit.tif", "float.tif"):
        out = np.asarray(decode(tmp_path / name))
        assert out.shape == (16, 16, 3)
        assert np.abs(out[..., 0].astype(int) - expected).max() <= 1, name
    assert np.asarray(decode(tmp_path / "dark.png")).max() == 1


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(noise(0, 8, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "turned.png"), np.rot90(np.asarray(image), -1))
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (8, 24)
    image.save(tmp_path / "broken.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(tmp_path / "broken.jpg").size == (24, 8)


def test_bad_pictures_give_their_reason(tmp_path, monkeypatch):
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    empty = tmp_path / "empty.png"
    empty.touch()
    cut = save(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-300])
    corrupt = save(tmp_path / "corrupt.png")
    content = bytearray(corrupt.read_bytes())
    content[60:80] = bytes(20)
    corrupt.write_bytes(content)
    for path, reason in (
        (text, "not a picture"),
        (empty, "not a picture"),
        (cut, "truncated"),
        (corrupt, "."),
        (tmp_path / "absent.jpg", "No such file"),
    ):
        with pytest.raises(BadPictureError, match=reason):
            decode(path)
    whole = save(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(BadPictureError, match="decompression bomb"):
        decode(whole)


# --- randomness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ShuffleSampler, RASampler])
def test_batches_do_not_depend_on_the_worker_count(kind):
    dataset = array_set()
    runs = []
    for num_workers in (0, 1, 2):
        sampler = kind(13, seed=1)
        sampler.set_epoch(2)
        runs.append(load(dataset, sampler, num_workers))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    other = kind(13, seed=1)
    other.set_epoch(3)
    assert not torch.equal(load(dataset, other)[0].images, runs[0][0].images)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_mid_epoch_gives_the_tail(num_workers):
    dataset, sampler = array_set(), ShuffleSampler(13, seed=1)
    sampler.set_epoch(5)
    whole = load(dataset, sampler)
    sampler.set_epoch(5, start=8)
    assert_same(whole[2:], load(dataset, sampler, num_workers))


def test_persistent_workers_follow_the_epoch():
    dataset, sampler = array_set(), ShuffleSampler(13, seed=1)
    loader = build_loader(
        dataset, sampler, batch_size=4, num_workers=1, pin_memory=False, drop_last=True, seed=0
    )
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert_same(list(loader), load(dataset, sampler, drop_last=True))


def test_two_processes_see_what_one_sees():
    """Rank r of two has every second sample of the single process's batches."""
    dataset = array_set(12)
    single = load(dataset, ShuffleSampler(12, seed=1), batch_size=12)[0]
    for rank in range(2):
        sampler = ShuffleSampler(12, num_replicas=2, rank=rank, seed=1)
        part = load(dataset, sampler, batch_size=6)[0]
        assert torch.equal(part.images, single.images[rank::2])
        assert torch.equal(part.positions, single.positions[rank::2])


def test_augmentation_is_seeded_by_seed_epoch_and_position():
    dataset = array_set()
    image = dataset[SampleKey(4, 7, 9)].image
    seed_all(derive_seed(3, "sample", 7, 9))
    assert torch.equal(image, TRAIN(Image.fromarray(noise(4))))
    for key in (SampleKey(4, 8, 9), SampleKey(4, 7, 10)):
        assert not torch.equal(dataset[key].image, image)
    assert not torch.equal(array_set(seed=4)[SampleKey(4, 7, 9)].image, image)


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


def test_evaluation_covers_the_set_in_shares():
    dataset = array_set(13, is_train=False, transform=EVAL)
    seen = [
        (index, target)
        for rank in range(3)
        for batch in load(dataset, EvalSampler(13, num_replicas=3, rank=rank))
        for index, target in zip(batch.indices.tolist(), batch.targets.tolist(), strict=True)
    ]
    assert sorted(seen) == [(i, i % 3) for i in range(13)]


# --- bad pictures in a set ----------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path):
    """Six pictures of which numbers 1, 2 and 5 can't be read."""
    for i in range(6):
        save(tmp_path / "train" / "ab"[i // 3] / f"{i}.png", seed=i)
        save(tmp_path / "val" / "ab"[i // 3] / f"{i}.png", seed=i)
    for part in ("train", "val"):
        for name in ("a/1.png", "a/2.png", "b/5.png"):
            (tmp_path / part / name).write_text("oops")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_bad_picture_stops_with_its_name(spoilt, num_workers, is_train):
    dataset = open_set("IMNET", spoilt, is_train)
    with pytest.raises(DataError, match=r"a/1\.png: not a picture.*--on-bad-image skip"):
        load(dataset, EvalSampler(6), num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_replaces_bad_pictures(spoilt, num_workers):
    dataset = open_set("IMNET", spoilt, on_bad_image="skip")
    batch = load(dataset, EvalSampler(6), num_workers, batch_size=6)[0]
    assert batch.indices.tolist() == [0, 3, 3, 3, 4, 0]
    assert batch.targets.tolist() == [0, 1, 1, 1, 1, 0]
    assert batch.positions.tolist() == list(range(6))
    assert [line.split(": ")[0][-7:] for line in batch.bad] == [
        "a/1.png", "a/2.png", "a/2.png", "b/5.png",
    ]  # fmt: skip


def test_evaluation_leaves_bad_pictures_out(spoilt):
    dataset = open_set("IMNET", spoilt, is_train=False, on_bad_image="skip")
    batches = load(dataset, EvalSampler(6), batch_size=1)
    assert [b.indices.tolist() for b in batches] == [[0], [], [], [3], [4], []]
    assert batches[1].images.shape == (0, 3, 0, 0) and batches[1].targets.dtype == torch.int64
    assert [len(b.bad) for b in batches] == [0, 1, 1, 0, 0, 1]
    whole = load(dataset, EvalSampler(6), batch_size=6)[0]
    assert whole.indices.tolist() == [0, 3, 4] and len(whole.bad) == 3


def test_a_set_without_any_readable_picture_stops(spoilt):
    dataset = open_set("IMNET", spoilt, on_bad_image="skip").subset([1, 2, 5])
    with pytest.raises(DataError, match=r"a/1\.png"):
        load(dataset, EvalSampler(3))


class _Killer(datasets.Source):
    classes, targets = ["a"], np.zeros(4, dtype=np.int64)

    def open(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def sample_id(self, index):
        return f"killer#{index}"


def test_a_killed_worker_is_a_clear_error():
    with pytest.raises(DataError, match=r"killer#0: a loader process died.*/dev/shm.*--num-worker"):
        load(ImageDataset(_Killer(), EVAL), EvalSampler(4), num_workers=1)


class _Buggy(datasets.Source):
    classes, targets = ["a"], np.zeros(4, dtype=np.int64)

    def open(self, index):
        raise ZeroDivisionError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bugs_keep_their_type(num_workers):
    with pytest.raises(ZeroDivisionError):
        load(ImageDataset(_Buggy(), EVAL), EvalSampler(4), num_workers=num_workers)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(OptionError, match="--batch-size: 14 is more than the 13"):
        load(array_set(), ShuffleSampler(13), batch_size=14, drop_last=True)


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", seed=10 * label + i)
    return tmp_path


def test_image_folder(folders, caplog):
    (folders / "train/ant/notes.txt").write_text("x")
    (folders / "train/.hidden").mkdir()
    save(folders / "train/ant/deep/er/9.JPEG", seed=99, format="JPEG")
    save(folders / "train/ant/.cache/8.png", seed=99)
    with caplog.at_level(logging.INFO):
        train, val = (open_set("imnet", folders, is_train) for is_train in (True, False))
    assert "1 files that are not pictures" in caplog.text
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.targets.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert val.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert val.sample_id(2) == str(folders / "val/bee/0.png")
    assert torch.equal(val[2].image, EVAL(Image.fromarray(noise(10))))
    assert pickle.loads(pickle.dumps(val)).sample_id(2) == val.sample_id(2)


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_the_validation_part(folders, name):
    (folders / "val").rename(folders / name)
    assert len(open_set("IMNET", folders, is_train=False)) == 6


def test_class_folders_with_a_held_out_share(folders):
    parts = [open_set("IMNET", folders / "train", t, val_fraction=0.25) for t in (True, False)]
    assert [np.bincount(p.targets).tolist() for p in parts] == [[3, 3, 3], [1, 1, 1]]
    ids = [{p.sample_id(i) for i in range(len(p))} for p in parts]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 12
    (folders / "val").rename(folders / "unused")
    assert len(open_set("IMNET", folders, False, val_fraction=0.25)) == 3


def test_folder_mistakes(folders, tmp_path_factory, caplog):
    def refused(kind, match, path=folders, is_train=False, **options):
        with pytest.raises(kind, match=match):
            open_set("IMNET", path, is_train, **options)

    refused(OptionError, "--data-path: .*does not exist", folders / "nowhere")
    refused(OptionError, "--data-path: IMNET needs the folder", "")
    refused(OptionError, r"--data-path: .*--val-fraction 0\.1", folders / "train")
    refused(OptionError, "has no train/", tmp_path_factory.mktemp("empty"))
    refused(OptionError, "--val-fraction: .*own validation part", val_fraction=0.1)
    save(folders / "val/dog/0.png")
    refused(DataError, r"val/dog: no class of that name")
    (folders / "val/dog/0.png").unlink()
    (folders / "val/dog").rmdir()
    for file in (folders / "val/bee").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert open_set("IMNET", folders, False).targets.tolist() == [0, 0, 2, 2]
    assert "has no pictures of 1 classes: bee" in caplog.text
    (folders / "train/eel").mkdir()
    refused(DataError, r"train/eel holds no pictures", is_train=True)
    (folders / "val").rename(folders / "unused")
    refused(OptionError, r"no val/ folder: add one, or --val-fraction", is_train=True)


# --- splits and counts --------------------------------------------------------------------------


def test_stratified_split_keeps_proportions():
    labels = np.array([0] * 100 + [1] * 40 + [2] * 2 + [3])
    np.random.RandomState(1).shuffle(labels)
    train, val = stratified_split(labels, 0.2, seed=0)
    assert np.bincount(labels[val], minlength=4).tolist() == [20, 8, 1, 0]
    assert sorted([*train, *val]) == list(range(143))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)
    assert np.array_equal(val, stratified_split(labels, 0.2, seed=0)[1])
    assert not np.array_equal(val, stratified_split(labels, 0.2, seed=1)[1])
    two = stratified_split([0, 0, 1, 1], 0.9, seed=0)
    assert [len(part) for part in two] == [2, 2]


def test_class_summary():
    def of(counts):
        targets = np.repeat(np.arange(len(counts)), counts)
        names = [chr(ord("a") + i) for i in range(len(counts))]
        source = ArraySource(np.zeros((len(targets), 8, 8), np.uint8), targets, names, "x")
        return summarise_classes(ImageDataset(source, EVAL))

    counts, lines = of([5, 7, 9])
    assert counts.tolist() == [5, 7, 9]
    assert lines == ["pictures a class: a 5, b 7, c 9"]
    assert of([5] * 20 + [9])[1] == ["pictures a class: 5 (a) to 9 (u)"]
    assert "warning: the most frequent class has 10 times" in of([5, 50, 5])[1][1]
    assert len(of([5, 49, 5])[1]) == 1
    assert of([5, 0, 5])[1][1] == "warning: no pictures of 1 classes: b"


def test_subset_keeps_labels_and_names(folders):
    dataset = open_set("IMNET", folders).subset([11, 0])
    assert dataset.targets.tolist() == [2, 0] and dataset.classes == ["ant", "bee", "cat"]
    assert dataset.sample_id(0).endswith("train/cat/3.png")
    assert dataset[0].target == 2
    assert torch.equal(dataset[0].image, EVAL(Image.fromarray(noise(23))))


# --- small sets ---------------------------------------------------------------------------------


def test_digits_split_is_the_same_for_every_seed():
    train, val = (open_set("DIGITS", "", t, seed=t) for t in (True, False))
    again = open_set("digits", "", False, seed=99)
    assert (len(train), len(val), train.classes[7]) == (1438, 359, "7")
    assert torch.equal(val[0].image, again[0].image)
    assert np.array_equal(val.targets, again.targets)
    pictures = train.source.source.images
    assert pictures.shape == (1797, 8, 8) and pictures.max() == 255
    counts = np.bincount(val.targets)
    assert counts.min() >= 35 and counts.max() <= 37
    assert len(open_set("DIGITS", "", False, val_fraction=0.5)) == pytest.approx(898, abs=5)


def test_normalization_of_small_sets():
    pictures = open_set("DIGITS", "").source.source.images.astype(np.float64) / 255
    mean, std = default_normalization("digits")
    assert mean == pytest.approx([pictures.mean()] * 3, abs=1e-4)
    assert std == pytest.approx([pictures.std()] * 3, abs=1e-4)
    assert default_normalization("CIFAR") == default_normalization("CIFAR100")
    assert default_normalization("CIFAR10")[0] == (0.4914, 0.4822, 0.4465)
    assert default_normalization("IMNET") is None


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_idx_files(tmp_path, ending, folder):
    images = np.random.RandomState(0).randint(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for prefix, part in (("train", slice(None)), ("t10k", slice(3))):
        write_idx(tmp_path / folder / f"{prefix}-images-idx3-ubyte{ending}", images[part])
        write_idx(tmp_path / folder / f"{prefix}-labels-idx1-ubyte{ending}", labels[part])
    train, val = (open_set("FMNIST", tmp_path, t) for t in (True, False))
    assert (len(train), len(val), train.classes[5]) == (7, 3, "Sandal")
    assert train.targets.tolist() == list(range(7))
    assert torch.equal(train[4].image, EVAL(Image.fromarray(images[4]).convert("RGB")))


def test_damaged_idx_files(tmp_path):
    with pytest.raises(OptionError, match="no train-images-idx3-ubyte.*--download"):
        open_set("MNIST", tmp_path)
    images = tmp_path / "train-images-idx3-ubyte"
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    write_idx(images, np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(DataError, match="3 labels for 2 pictures"):
        open_set("MNIST", tmp_path)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is damaged"):
        open_set("MNIST", tmp_path)
    images.write_bytes(b"hello world")
    with pytest.raises(DataError, match="is not an IDX file"):
        open_set("MNIST", tmp_path)
    images.rename(f"{images}.gz")
    with pytest.raises(DataError, match=r"ubyte\.gz can't be read"):
        open_set("MNIST", tmp_path)


def test_cifar(tmp_path, monkeypatch):
    import torchvision

    with pytest.raises(OptionError, match="--data-path: no CIFAR10.*--download"):
        open_set("CIFAR10", tmp_path)
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    names = ["plane", "car", "bird"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for number, (file, _) in enumerate([*kind.train_list, *kind.test_list]):
        data = np.full((2, 3072), number, np.uint8)
        data[:, 0] = 200  # red of the first pixel: channels come first in the file
        (folder / file).write_bytes(pickle.dumps({"data": data, "labels": [number % 3, 1]}))
    for path in (tmp_path, folder):
        train, val = (open_set("CIFAR10", path, t) for t in (True, False))
        assert (len(train), len(val), train.classes) == (10, 2, names)
    assert train.targets.tolist() == [0, 1, 1, 1, 2, 1, 0, 1, 1, 1]
    assert train.source.images[2, 0, 0].tolist() == [200, 1, 1]
    with pytest.raises(OptionError, match="--val-fraction"):
        open_set("CIFAR10", tmp_path, val_fraction=0.1)


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    import torchvision

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    fail.base_folder = "x"
    with pytest.raises(DataError, match="CIFAR100 can't be downloaded: no route to host"):
        open_set("CIFAR", tmp_path / "new", download=True)


# --- iNaturalist --------------------------------------------------------------------------------


def write_inat(root, year, shortened):
    levels = [
        {"id": i, "kingdom": k, "name": f"species {i}", "genus": f"g{i // 2}"}
        for i, k in enumerate(["Plantae", "Animalia", "Animalia"])
    ]
    (root / "categories.json").write_text(json.dumps(levels))
    for part, categories in (("train", [2, 0, 1, 2]), ("val", [1, 2])):
        images, annotations = [], []
        for i, category in enumerate(categories):
            number = i + 100 * (part == "val")
            folder = f"train_val{year}"
            name = f"{folder}/{levels[category]['kingdom']}/{category}/{number}.jpg"
            where = f"{folder}/{category}/{number}.jpg" if shortened else name
            save(root / where, seed=number, quality=95)
            images.append({"id": number, "file_name": name})
            annotations.append({"image_id": number, "category_id": category})
        text = json.dumps({"images": images, "annotations": annotations[::-1][::-1]})
        (root / f"{part}{year}.json").write_text(text)


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("shortened", [False, True])
def test_inaturalist(tmp_path, name, year, shortened):
    write_inat(tmp_path, year, shortened)
    train, val = (open_set(name, tmp_path, t) for t in (True, False))
    # as in DeiT: classes in the order of the training annotations
    assert train.classes == val.classes == ["species 2", "species 0", "species 1"]
    assert train.targets.tolist() == [0, 1, 2, 0]
    assert val.targets.tolist() == [2, 0]
    assert val[1].target == 0 and not val[1].bad
    kingdoms = open_set(name, tmp_path, False, inat_category="kingdom")
    assert kingdoms.classes == ["Animalia", "Plantae"] and kingdoms.targets.tolist() == [0, 0]
    assert INatDataset(tmp_path, year=year, category="genus").classes == ["g1", "g0"]


def test_inaturalist_mistakes(tmp_path):
    with pytest.raises(OptionError, match=r"categories\.json does not exist"):
        open_set("INAT", tmp_path)
    write_inat(tmp_path, 2018, False)
    with pytest.raises(OptionError, match="--inat-category: 'order' is not in"):
        open_set("INAT", tmp_path, inat_category="order")
    with pytest.raises(OptionError, match=r"train2019\.json does not exist"):
        open_set("INAT19", tmp_path)
    train = json.loads((tmp_path / "train2018.json").read_text())
    few = {key: values[:3:2] for key, values in train.items()}
    (tmp_path / "train2018.json").write_text(json.dumps(few))
    assert open_set("INAT", tmp_path, False).classes == ["species 2", "species 1"]
    fewer = {key: values[:1] for key, values in train.items()}
    (tmp_path / "train2018.json").write_text(json.dumps(fewer))
    with pytest.raises(DataError, match="not in train2018.json: species 1"):
        open_set("INAT", tmp_path, False)
    (tmp_path / "val2018.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(DataError, match="iNaturalist's form"):
        open_set("INAT", tmp_path, False)
    (tmp_path / "val2018.json").write_text("{")
    with pytest.raises(DataError, match=r"val2018\.json can't be read"):
        open_set("INAT", tmp_path, False)


# --- CSV ----------------------------------------------------------------------------------------


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("delimiter", list(",;\t|"))
@pytest.mark.parametrize("header", [None, ["path", "label"], ["Image", "Class"]])
def test_csv_folder(tmp_path, delimiter, header):
    names = [save(tmp_path / "pics" / f"p {i}.png", seed=i).relative_to(tmp_path) for i in range(4)]
    head = [header] if header else []
    rows = list(zip(names, ["pear", "fig", "pear", "apple"], strict=True))
    write_csv(tmp_path / "train.csv", head + rows, delimiter)
    write_csv(tmp_path / "val.csv", head + rows[:2], delimiter)
    train, val = (open_set("CSV", tmp_path, t) for t in (True, False))
    assert train.classes == val.classes == ["apple", "fig", "pear"]
    assert train.targets.tolist() == [2, 1, 2, 0] and val.targets.tolist() == [2, 1]
    assert torch.equal(train[3].image, EVAL(Image.fromarray(noise(3))))


def test_csv_columns_in_any_order_and_numeric_classes(tmp_path):
    names = [save(tmp_path / f"{i}.png").name for i in range(12)]
    rows = [(f"id{i}", str(i), names[i]) for i in range(12)]
    write_csv(tmp_path / "all.csv", [("id", "target", "filename"), *rows])
    train = open_set("CSV", tmp_path / "all.csv", val_fraction=0.5)
    assert train.classes == [str(i) for i in range(12)]
    assert train.targets.tolist() == list(range(12))


def test_csv_file_is_split_by_class_and_seed(tmp_path):
    names = [save(tmp_path / f"{i}.png").name for i in range(20)]
    write_csv(tmp_path / "all.csv", [(n, "ab"[i % 2]) for i, n in enumerate(names)])
    train, val = (
        open_set("CSV", tmp_path / "all.csv", t, val_fraction=0.2, seed=4) for t in (True, False)
    )
    assert np.bincount(train.targets).tolist() == [8, 8]
    assert np.bincount(val.targets).tolist() == [2, 2]
    ids = {d.sample_id(i) for d in (train, val) for i in range(len(d))}
    assert len(ids) == 20
    other = open_set("CSV", tmp_path / "all.csv", False, val_fraction=0.2, seed=5)
    assert not np.array_equal(other.source.indices, val.source.indices)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,label\nx.png,a\n\nx.png\n", "line 4: 1 columns instead of 2"),
        ("path,label\nx.png,\n", "line 2: no label"),
        ("path,label\n ,a\n", "line 2: no path"),
        ("path,note\nx.png,a\n", "line 1: no column named label"),
        ("photo,kind\nx.png,a\n", "line 1: neither a header"),
        ("x.png\n", "line 1: expected two columns"),
        ("", "line 1: expected two columns"),
        ("path,label\n", "has no pictures"),
    ],
)
def test_csv_mistakes_name_the_line(tmp_path, text, match):
    save(tmp_path / "x.png")
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=rf"train\.csv.*{match}"):
        open_set("CSV", tmp_path, val_fraction=0.5)


def test_more_csv_mistakes(tmp_path):
    save(tmp_path / "x.png")
    with pytest.raises(OptionError, match=r"--data-path: .*train\.csv does not exist"):
        open_set("CSV", tmp_path)
    (tmp_path / "train.csv").write_text("x.png,a\nx.png,b\n")
    with pytest.raises(OptionError, match="--val-fraction: .*val.csv"):
        open_set("CSV", tmp_path)
    (tmp_path / "val.csv").write_text("path,label\nx.png,a\nx.png,c\n")
    with pytest.raises(DataError, match=r"val\.csv, line 3: no class 'c'"):
        open_set("CSV", tmp_path, False)
    with pytest.raises(OptionError, match="--val-fraction"):
        open_set("CSV", tmp_path, val_fraction=0.5)


# --- shards and readers -------------------------------------------------------------------------


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    number = 0
    for shard, count in (("set-train-0000", 3), ("set-train-0001", 2), ("set-val-0000", 2)):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for _ in range(count):
                sample = {"__key__": f"s{number:03d}", "png": png(number), "cls": number % 4}
                writer.write(sample)
                number += 1
    train, val = (open_set("wds/set", tmp_path, t) for t in (True, False))
    assert train.classes == val.classes == ["0", "1", "2", "3"]
    assert train.targets.tolist() == [0, 1, 2, 3, 0] and val.targets.tolist() == [1, 2]
    assert train.sample_id(3).endswith("set-train-0001.tar:s003")
    for i in range(5):
        assert torch.equal(train[i].image, EVAL(Image.fromarray(noise(i))))
    batches = [load(train, RASampler(5, seed=2), workers) for workers in (0, 2)]
    assert_same(*batches)


def test_webdataset_info_and_json_labels(tmp_path):
    samples = [
        (f"d/{i}.{end}", body)
        for i in range(3)
        for end, body in (("seg.txt", b"x"), ("JPG", png(i)), ("json", b'{"label": %d}' % i))
    ]
    write_shard(tmp_path / "one.tar", samples)
    write_shard(tmp_path / "two.tar", samples[:3])
    splits = {"train": {"filenames": ["one.tar"]}, "validation": {"filenames": ["two.tar"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert open_set("wds/x", tmp_path).targets.tolist() == [0, 1, 2]
    assert len(open_set("wds/x", tmp_path, False)) == 1


def test_webdataset_mistakes(tmp_path):
    with pytest.raises(OptionError, match=r"no shards \*train\*\.tar"):
        open_set("wds/x", tmp_path)
    shard = tmp_path / "train.tar"
    write_shard(shard, [("a.png", png(0)), ("a.cls", b"zero")])
    with pytest.raises(DataError, match="sample a needs its label"):
        open_set("wds/x", tmp_path)
    write_shard(shard, [("a.cls", b"0")])
    with pytest.raises(DataError, match="sample a has no picture"):
        open_set("wds/x", tmp_path)
    shard.write_bytes(gzip.compress(b"x" * 100))
    with pytest.raises(DataError, match="not a plain tar file"):
        open_set("wds/x", tmp_path)
    write_shard(shard, [("a.png", png(0)), ("a.cls", b"0")])
    with pytest.raises(OptionError, match=r"no shards \*val\*\.tar"):
        open_set("wds/x", tmp_path, False)
    write_shard(tmp_path / "val.tar", [("a.png", png(0)), ("a.cls", b"1")])
    with pytest.raises(DataError, match=r"val\.tar:a: label 1 is none of the 1 classes"):
        open_set("wds/x", tmp_path, False)


FAKE_HUGGING_FACE = """
import types
import numpy as np

class Dataset:
    info = types.SimpleNamespace(
        features={"label": types.SimpleNamespace(names=["a", "b"], num_classes=2,
            str2int=lambda n: "ab".index(n))},
        splits=None,
    )
    def __init__(self, root):
        self.root = root
    def cast_column(self, *args):
        return self
    def __len__(self):
        return 2
    def __getitem__(self, i):
        if i == "label":
            return [0, 1]
        return {"image": {"bytes": None, "path": f"{self.root}/{i}.png"}, "label": i}

def load_dataset(name, split, cache_dir, **kwargs):
    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split}")
    return Dataset(cache_dir)

def Image(decode):
    assert not decode
"""


@pytest.fixture
def no_hugging_face(monkeypatch):
    monkeypatch.setattr(datasets, "_hugging_face_package", None)
    yield
    for name in [n for n in sys.modules if n.startswith("timm.data.readers.reader_hfds")]:
        del sys.modules[name]


def test_hugging_face_package_of_the_same_name(tmp_path, monkeypatch, no_hugging_face):
    """The reader finds the package ``datasets``, everyone else finds this project's module."""
    (tmp_path / "site" / "datasets").mkdir(parents=True)
    (tmp_path / "site" / "datasets" / "__init__.py").write_text(FAKE_HUGGING_FACE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for i in range(2):
        save(tmp_path / f"{i}.png", seed=i)
    train, val = (open_set("hfds/some/Set", tmp_path, t) for t in (True, False))
    assert sys.modules["datasets"] is datasets
    assert train.classes == ["a", "b"] and train.targets.tolist() == [0, 1]
    assert val.sample_id(1) == "hfds/some/Set test#1"
    copy = pickle.loads(pickle.dumps(train))
    for dataset in (train, copy):
        assert torch.equal(dataset[1].image, EVAL(Image.fromarray(noise(1))))
    assert_same(load(train, EvalSampler(2)), load(train, EvalSampler(2), num_workers=1))


def test_missing_packages_are_named(tmp_path, monkeypatch, no_hugging_face):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(OptionError, match="--data-set: tfds/ needs: pip install tensorflow"):
        open_set("tfds/x", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(OptionError, match="--data-set: hfds/ needs: pip install datasets"):
        open_set("hfds/x", tmp_path)
    assert sys.modules["datasets"] is datasets


def test_tensorflow_datasets(tmp_path, monkeypatch):
    """Its random access data source, stood in for by a list."""

    class Builder:
        info = types.SimpleNamespace(features={"label": types.SimpleNamespace(names=["a", "b"])})

        def as_data_source(self, split, decoders):
            if split == "validation":
                raise ValueError("unknown split")
            assert decoders == {"image": "skip"}
            return [{"image": png(i), "label": np.int64(i % 2)} for i in range(3)]

    fake = types.ModuleType("tensorflow_datasets")
    fake.builder = lambda name, data_dir, file_format: Builder()
    fake.decode = types.SimpleNamespace(SkipDecoding=lambda: "skip")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    train, val = (open_set("tfds/x", tmp_path, t) for t in (True, False))
    assert len(train) == 3 and train.classes == ["a", "b"] and train.targets is None
    assert val.sample_id(1) == "tfds/x test#1"
    batch = load(train.subset([2, 1]), EvalSampler(2))[0]
    assert batch.targets.tolist() == [0, 1]
    assert torch.equal(batch.images[0], EVAL(Image.fromarray(noise(2))))
    assert summarise_classes(train)[1] == ["pictures a class: unknown before they are read"]


# --- registry -----------------------------------------------------------------------------------


def test_plugins_can_add_a_set(monkeypatch):
    monkeypatch.setattr(datasets, "_REGISTRY", dict(datasets._REGISTRY))

    @register_dataset("Flags")
    def flags(is_train, data, seed):
        return ArraySource(
            np.zeros((3 if is_train else 2, 8, 8), np.uint8),
            [0, 1][:2] + [0] * is_train,
            ["x", "y"],
            "flags",
        )

    assert len(open_set("flags", "", True)) == 3 and len(open_set("FLAGS", "", False)) == 2


@pytest.mark.parametrize(
    ("name", "hint"), [("CIFAR01", "did you mean CIFAR10"), ("q", "one of IMNET")]
)
def test_unknown_sets_are_refused(name, hint):
    with pytest.raises(OptionError, match=f"--data-set: unknown data set '{name}'; {hint}"):
        open_set(name, "")


def test_auto_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert [datasets.auto_num_workers(n) for n in (1, 8, 128)] == [10, 8, 0]
