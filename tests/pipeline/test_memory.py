"""pipeline/memory.py: decoded images, and whether they fit."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import image_folder
from tiny_sets import array_set, noise, open_set

from errors import DataError, OptionError
from pipeline.decoding import decode_tensor
from pipeline.memory import MemorySource, available_memory, check_memory, is_small, read_all
from pipeline.sources.base import ArraySource


def test_memory_of_this_machine_is_known():
    assert available_memory() > 1 << 28


def test_decoded_images_of_any_size(tmp_path):
    """As the source gives them; one that couldn't be read is asked for again."""
    shapes = [(4, 6), (3, 3), (5, 2)]
    arrays = [noise(i, *shape) for i, shape in enumerate(shapes)]
    source = array_set(3).source
    images = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    memory = MemorySource(source, [images[0], None, images[2]], np.array([2, 0, 1]))
    assert memory.bytes_in_memory == 3 * (4 * 6 + 5 * 2)
    assert np.array_equal(memory.open(0), arrays[0]) and np.array_equal(memory.open(2), arrays[2])
    assert np.array_equal(memory.open(1), source.open(1))
    assert memory.read(2)[1] == 1
    assert memory.sample_id(2) == source.sample_id(2) and memory.classes == source.classes


def test_reading_all_images(tmp_path):
    root = image_folder(tmp_path, {"train": 2, "val": 1})
    (root / "train/blue/1.png").write_text("nothing")
    dataset = open_set("IMNET", root, on_bad_image="skip")
    decoded = read_all(dataset, decode_tensor, visible=False)
    assert decoded.targets[[0, 1, 2, 4, 5]].tolist() == [0, 0, 1, 2, 2]
    assert list(decoded.bad) == [3] and decoded.images[3] is None
    assert decoded.bad[3].startswith(f"{root}/train/blue/1.png: not an image")
    fits = {size: decoded.in_one_size(size) for size in ((12, 12), (10, 14), (14, 14), (12, 16))}
    assert [size for size, whether in fits.items() if whether] == [(12, 12), (10, 14)]
    stacked = decoded.stacked()
    assert stacked.shape == (6, 3, 12, 14) and stacked.dtype == torch.uint8
    with Image.open(root / "train/crimson/1.png") as image:
        assert np.array_equal(stacked[5].permute(1, 2, 0), np.asarray(image))
    assert not stacked[3].any()
    with pytest.raises(DataError, match="no image could be read"):
        read_all(dataset.subset([3]), decode_tensor, visible=False)
    with pytest.raises(DataError, match=r"blue/1\.png.*--on-bad-image skip"):
        read_all(open_set("IMNET", root), decode_tensor, visible=False)


def test_small_images_are_few_and_of_one_size(tmp_path):
    root = image_folder(tmp_path, {"train": 2, "val": 1})
    assert is_small(open_set("IMNET", root).source)
    Image.new("RGB", (15, 12)).save(root / "train/blue/7.png")
    assert not is_small(open_set("IMNET", root).source)

    def arrays(count, side):
        # One row of memory stands for all images.
        images = np.broadcast_to(np.zeros((1, side, side), np.uint8), (count, side, side))
        return ArraySource(images, np.zeros(count), ["a"], "arrays")

    assert is_small(arrays(5, 96)) and not is_small(arrays(5, 97))
    assert is_small(arrays(77_000, 96)) and not is_small(arrays(78_000, 96))


def test_a_set_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.memory.available_memory", lambda: 20_000)
    source = open_set("IMNET", image_folder(tmp_path, {"train": 8, "val": 3})).source
    # 24 images of 14×12 pixels, twice: 24 kB.
    with pytest.raises(OptionError, match=r"24 decoded images need about 0.0 GiB.*use none"):
        check_memory(source)
    monkeypatch.setattr("pipeline.memory.available_memory", lambda: 24_192)
    check_memory(source)
    monkeypatch.setattr("pipeline.memory.available_memory", lambda: None)
    check_memory(source)


def test_pipes_and_endless_files_hold_nobody(tmp_path):
    """``--cache auto`` looks into images in the main process, which no loader's timeout frees."""
    root = image_folder(tmp_path, {"train": 2, "val": 1})
    assert is_small(open_set("IMNET", root).source)
    for name in ("0.png", "1.png"):
        (root / "train/blue" / name).unlink()
    os.mkfifo(root / "train/blue/0.png")
    (root / "train/blue/1.png").symlink_to("/dev/zero")
    dataset = open_set("IMNET", root, on_bad_image="skip")
    assert not is_small(dataset.source)
    check_memory(dataset.source)
    bad = read_all(dataset, decode_tensor, visible=False).bad
    assert [text.rpartition(": ")[2] for text in bad.values()] == [
        "a pipe, not an image file",
        "a device, not an image file",
    ]
