"""pipeline/sources/idx.py: MNIST and Fashion-MNIST in IDX files."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import EVAL, open_set, write_idx

from errors import DataError, OptionError


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
