"""pipeline/sources/hugging_face.py: the package ``datasets`` beside this project's module."""

import importlib
import pickle
import sys

import pytest
import torch
from tiny_sets import assert_same, expected, load, open_set, save

from config import DataOptions
from errors import OptionError
from pipeline.dataset import ImageDataset
from samplers import EvalSampler

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


def of_the_package(name):
    """Whether a module is the package's, this project's of the same name, or timm's reader."""
    return name.split(".")[0] == "datasets" or name == "timm.data.readers.reader_hfds"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """A process that has imported none of these modules; afterwards they are put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = {name: module for name, module in sys.modules.items() if of_the_package(name)}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if of_the_package(name)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def package(tmp_path):
    """A folder with a package ``datasets``, which is found once the folder is on the path."""
    (tmp_path / "site" / "datasets").mkdir(parents=True)
    (tmp_path / "site" / "datasets" / "__init__.py").write_text(FAKE_HUGGING_FACE)
    for i in range(2):
        save(tmp_path / f"{i}.png", seed=i)
    return tmp_path / "site"


def open_both(root):
    return [open_set("hfds/some/Set", root, is_train) for is_train in (True, False)]


def test_images_labels_and_names(package, tmp_path):
    sys.path.insert(0, str(package))
    train, val = open_both(tmp_path)
    assert train.classes == ["a", "b"] and train.targets.tolist() == [0, 1]
    assert val.sample_id(1) == "hfds/some/Set test#1"
    for dataset in (train, pickle.loads(pickle.dumps(train))):
        assert torch.equal(dataset[1].image, expected(1))
    assert_same(load(train, EvalSampler(2)), load(train, EvalSampler(2), num_workers=1))


def test_package_keeps_the_name_for_good(package, tmp_path):
    """Also where this project's module was imported first; whoever has that goes on with it."""
    ours = importlib.import_module("datasets")
    assert hasattr(ours, "register_dataset")
    sys.path.insert(0, str(package))
    train, _ = open_both(tmp_path)
    theirs = sys.modules["datasets"]
    assert theirs is not ours and theirs.__file__.startswith(str(package))
    assert importlib.import_module("datasets") is theirs
    assert len(train) == 2
    # The project's module is there for those that imported it, and builds data sets as before.
    digits = ours.build_dataset(False, DataOptions(data_set="DIGITS"), seed=0)
    assert isinstance(digits, ImageDataset) and len(digits) == 359


def test_a_process_that_has_the_package_already(package, tmp_path):
    sys.path.insert(0, str(package))
    theirs = importlib.import_module("datasets")
    train, val = open_both(tmp_path)
    assert sys.modules["datasets"] is theirs
    assert [len(train), len(val)] == [2, 2]
    assert open_set("DIGITS", "").classes[7] == "7"


def test_missing_package_is_named(tmp_path, monkeypatch):
    """What was imported under the name stays."""
    ours = importlib.import_module("datasets")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(OptionError, match="--data-set: hfds/ needs: pip install datasets"):
        open_set("hfds/x", tmp_path)
    assert sys.modules["datasets"] is ours
