"""pipeline/sources/tensorflow.py: sets of tensorflow-datasets."""

import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import expected, load, noise, open_set

from errors import OptionError
from pipeline.dataset import summarise_classes
from samplers import EvalSampler


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(OptionError, match="--data-set: tfds/ needs: pip install tensorflow"):
        open_set("tfds/x", tmp_path)


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
    assert torch.equal(batch.images[0], expected(2))
    assert summarise_classes(train)[1] == ["images per class: unknown before they are read"]
