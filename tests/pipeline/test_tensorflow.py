"""pipeline/sources/tensorflow.py: sets of tensorflow-datasets."""

import sys
import types

import numpy as np
import pytest
import torch
from tiny_sets import expected, load, open_set, png

from errors import DataError, OptionError
from pipeline.dataset import summarise_classes
from samplers import EvalSampler


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(OptionError, match="--data-set: tfds/ needs: pip install tensorflow"):
        open_set("tfds/x", tmp_path)


def stand_in(monkeypatch, features, records):
    """The package's random access data source, stood in for by a list; a set without validation."""

    class Builder:
        info = types.SimpleNamespace(features=features)

        def as_data_source(self, split, decoders):
            if split == "validation":
                raise ValueError("unknown split")
            assert decoders == {"image": "skip"}
            return records

    fake = types.ModuleType("tensorflow_datasets")
    fake.builder = lambda name, data_dir, file_format: Builder()
    fake.decode = types.SimpleNamespace(SkipDecoding=lambda: "skip")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)


def test_tensorflow_datasets(tmp_path, monkeypatch):
    names = types.SimpleNamespace(names=["a", "b"])
    records = [{"image": png(i), "label": np.int64(i % 2)} for i in range(3)]
    stand_in(monkeypatch, {"label": names}, records)
    train, val = (open_set("tfds/x", tmp_path, t) for t in (True, False))
    assert len(train) == 3 and train.classes == ["a", "b"] and train.targets is None
    assert val.sample_id(1) == "tfds/x test#1"
    batch = load(train.subset([2, 1]), EvalSampler(2))[0]
    assert batch.targets.tolist() == [0, 1]
    assert torch.equal(batch.images[0], expected(2))
    assert summarise_classes(train)[1] == ["images per class: unknown before they are read"]


def test_a_sequence_of_class_labels_is_any_number_of_them(tmp_path, monkeypatch):
    names = types.SimpleNamespace(names=["a", "b", "c"])
    features = {"image": None, "labels": types.SimpleNamespace(feature=names)}
    numbers = [np.array(each, dtype=np.int64) for each in ([2, 0], [], [1, 1])]
    records = [{"image": png(i), "labels": each} for i, each in enumerate(numbers)]
    stand_in(monkeypatch, features, records)
    train = open_set("tfds/x", tmp_path, task="multilabel")
    assert train.classes == ["a", "b", "c"]
    assert train.targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    batch = load(train.subset([2, 0]), EvalSampler(2))[0]
    assert batch.targets.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert torch.equal(batch.images[0], expected(2))
    records[1]["labels"] = np.array([-1])
    with pytest.raises(DataError, match="tfds/x train#1: label -1 is none of 3 classes"):
        open_set("tfds/x", tmp_path, task="multilabel")
    stand_in(monkeypatch, {"label": names}, records)
    with pytest.raises(DataError, match="no sequence of class labels .* its features are label"):
        open_set("tfds/x", tmp_path, task="multilabel")
