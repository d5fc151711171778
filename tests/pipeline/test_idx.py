"""pipeline/sources/idx.py: MNIST and Fashion-MNIST in IDX files."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import EVAL, open_set, write_idx

from errors import DataError, OptionError
from pipeline.sources import idx


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
    with pytest.raises(DataError, match="3 labels for 2 images"):
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


def head(*shape):
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()


HOSTILE = {
    "sizes that overflow": (head(2**32 - 1, 2**32 - 1, 2**32 - 1), "no more than 1 GiB are read"),
    "more than comes": (head(2**20, 28, 28), "0 bytes don't fit its sizes"),
    "no images": (head(0, 28, 28), r"its sizes are \[0, 28, 28\]"),
    "a short header": (head(2, 28), "is not an IDX file"),
    "cut off": (head(2, 28, 28)[:-1], "its sizes are"),
    "more behind it": (head(1, 1, 1) + bytes(2), "more bytes don't fit"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path, name, ending):
    content, message = HOSTILE[name]
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(DataError, match=message):
        idx.read_idx(path, 3)


@pytest.mark.parametrize("place", [3, -20, -6, -3])
def test_damage_to_a_packed_file_is_named(tmp_path, place):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, np.arange(200, dtype=np.uint8).reshape(2, 10, 10))
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"idx3-ubyte\.gz"):
        idx.read_idx(path, 3)


def test_labels_are_those_of_ten_classes(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 4, 4), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 10], np.uint8))
    with pytest.raises(DataError, match="label 10, and MNIST has 10 classes, 0 to 9"):
        open_set("MNIST", tmp_path)
