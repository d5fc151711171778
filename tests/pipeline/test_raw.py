"""pipeline/sources/raw.py: packed pixels are read, and damage is said."""

import json
import os
import shutil

import numpy as np
import pytest
from tiny_images import image_folder

from config import DataOptions
from errors import DataError, OptionError
from pipeline.dataset import build_dataset
from pipeline.image_file import HEADER_BYTES, ROW_BYTES
from pipeline.limits import BadImageError
from pipeline.sources import registry
from pipeline.sources.base import ArraySource
from pipeline.sources.raw import INFO
from tools.data.__main__ import main


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    image_folder(root / "set", {"train": 3, "val": 1}, size=(60, 50))
    argv = ["pack", "--data-path", str(root / "set"), "--output-dir", str(root / "raw")]
    assert main([*argv, "--format", "raw", "--short-side", "32"]) == 0
    return root / "raw"


@pytest.fixture
def mine(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "raw")


def open_raw(folder, is_train=True):
    data = DataOptions(data_set="raw/x", data_path=str(folder))
    return build_dataset(is_train, data, seed=0)


def test_images_are_named_by_their_files(packed):
    dataset = open_raw(packed)
    assert dataset.sample_id(4) == f"{packed}/train.images:blue/1.png"
    assert dataset.source.identity(4) == "blue/1.png"
    assert dataset.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset.source.open(4).shape == (32, 38, 3)
    assert len(open_raw(packed, False)) == 3


def test_a_plugins_labels_may_be_numpys(tmp_path, monkeypatch):
    class Plugged(ArraySource):
        def read(self, index):
            return self.open(index), self.targets[index]

    images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.array([2, 0, 1])
    source = Plugged(images, labels, ["a", "b", "c"], "mine")
    monkeypatch.setitem(registry.FACTORIES, "PLUGGED", lambda is_train, data, seed: source)
    argv = ["pack", "--data-set", "PLUGGED", "--output-dir", str(tmp_path / "raw")]
    assert main([*argv, "--format", "raw"]) == 0
    assert open_raw(tmp_path / "raw").targets.tolist() == [2, 0, 1]


def test_a_damaged_image_is_a_bad_one(mine):
    path = mine / "train.images"
    with open(path, "r+b") as file:
        for place in (os.path.getsize(path) - 10, HEADER_BYTES + 2 * ROW_BYTES):
            file.seek(place)
            file.write(b"\xaa\xab")
    source = open_raw(mine).source
    for number in (2, 8):
        with pytest.raises(BadImageError, match="pack the set again"):
            source.open(number)
    assert source.open(7).shape == (32, 38, 3)


def change(folder, **entry):
    info = json.loads((folder / INFO).read_text())
    info["parts"]["train"] |= entry
    (folder / INFO).write_text(json.dumps(info))


def test_files_that_do_not_belong_together_are_refused(mine, packed):
    (mine / "train.list").write_bytes((packed / "val.list").read_bytes())
    with pytest.raises(DataError, match="don't belong together"):
        open_raw(mine)
    shutil.copy(packed / "train.list", mine)
    shutil.copy(packed / "val.images", mine / "train.images")
    with pytest.raises(DataError, match="don't belong together"):
        open_raw(mine)


@pytest.mark.parametrize("entry", [{"images": 0}, {"images": 1 << 60}, {"crc": None}, {"key": 3}])
def test_a_list_of_odd_values_is_refused(mine, entry):
    change(mine, **entry)
    with pytest.raises(DataError, match="no good .* pack the set again"):
        open_raw(mine)


def test_what_is_missing_is_named(mine, tmp_path):
    (mine / "train.images").write_bytes(b"")
    with pytest.raises(DataError, match="no file of these images"):
        open_raw(mine)
    (mine / "train.list").unlink()
    with pytest.raises(DataError, match="train.list: No such file"):
        open_raw(mine)
    with pytest.raises(OptionError, match="--format raw writes such a folder"):
        open_raw(tmp_path)
