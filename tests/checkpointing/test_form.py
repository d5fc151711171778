"""Checkpoints whose metadata mean something else: one line that says what is wrong."""

import functools

import pytest
import torch
from torch import nn

from augmentation.preprocessing import Preprocessing
from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.form import wrong_form
from errors import CheckpointError
from inference import load_for_inference


def nested(levels: int, copies: int) -> list:
    """A list of lists; with two copies, as many values as 2 to the ``levels``, in a small file."""
    value: list = []
    for _ in range(levels):
        value = [value] * copies
    return value


RUN = {"epoch": 1, "samples": 0}
TRUE = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).to_dict()
ODD = {
    "its config is str 'resnet50'": {"config": "resnet50"},
    "its config is list": {"config": [1]},
    r"its config has names that are no text \(1\)": {"config": {1: 2}},
    "its class_names is int 1000, not a list of names": {"class_names": 1000},
    "its class_names are 0, 1, not a list of names": {"class_names": [0, 1]},
    "its class_names is str": {"class_names": "cat,dog"},
    r"its entries have names that are no text \(5\)": {5: 1},
    "its preprocessing is list": {"preprocessing": [1]},
    "its preprocessing has no input_size": {"preprocessing": {"size": 3}},
    "the mean of its preprocessing: ": {"preprocessing": TRUE | {"mean": [1, 2]}},
    "the interpolation of its preprocessing: ": {"preprocessing": TRUE | {"interpolation": "x"}},
    "the crop_mode of its preprocessing: ": {"preprocessing": TRUE | {"crop_mode": "x"}},
    "its progress is int 3": {"progress": 3},
    "its progress has no epoch and no samples": {"progress": {"epoch": "three"}},
    "its metrics is float 0.9": {"metrics": 0.9},
    "its versions is str": {"versions": "2.0"},
    "its bad_images is int": {"bad_images": 7},
    "its class_names are a list, a dict": {"class_names": [["a"], {}]},
    "the input_size of its preprocessing: must be at most 8192": {
        "preprocessing": TRUE | {"input_size": 10**9}
    },
    "the input_size of its preprocessing is str '8'": {"preprocessing": TRUE | {"input_size": "8"}},
    "the input_size of its preprocessing is tuple": {"preprocessing": TRUE | {"input_size": (8,)}},
    "the crop_ratio of its preprocessing: must be at least": {
        "preprocessing": TRUE | {"crop_ratio": 1e-320}
    },
    "its preprocessing has means and stds of different numbers": {
        "preprocessing": TRUE | {"mean": [0.5]}
    },
    "the std of its preprocessing is NoneType": {"preprocessing": TRUE | {"std": None}},
    "the mean of its preprocessing is a Tensor": {"preprocessing": TRUE | {"mean": torch.zeros(3)}},
    "the background of its preprocessing: ": {"preprocessing": TRUE | {"background": "x"}},
    "the seed of its split is str": {"split": {"seed": "x"}},
    "the held_out of its split is ": {"split": {"held_out": torch.ones(2, 2)}},
    "its progress has no samples": {"progress": {"epoch": 1, "samples": -1}},
    "the best of its progress is str": {"progress": RUN | {"best": "high"}},
    "its optimizer is list": {"progress": RUN, "optimizer": [1]},
    "the factor of its schedule is a Tensor": {
        "progress": RUN,
        "schedule": {"factor": torch.ones(1)},
    },
    "the lr of its config is a Tensor": {"progress": RUN, "config": {"lr": torch.ones(1)}},
    "the acc of its metrics is a Tensor": {"progress": RUN, "metrics": {"acc": torch.ones(1)}},
    r"its bad_images are 7, not lines of text": {"progress": RUN, "bad_images": ["a", 7]},
    "its a.w is a sparse or nested tensor": {"a": {"w": torch.zeros(2, 2).to_sparse()}},
    "its w is a quantised tensor": {
        "w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    },
    r"its w is a tensor without values \(meta\)": {"w": torch.empty(2, device="meta")},
    "its w is a tensor of 4398046511104 bytes, of which 4 are": {
        "w": torch.zeros(1).expand(1 << 40)
    },
    "its n is a number of 1501 bits": {"n": 1 << 1500},
    "its deep is nested more than 64 levels deep": {"deep": nested(70, copies=1)},
    "it holds more than 10000000 values": {"wide": nested(40, copies=2)},
}


@pytest.mark.parametrize("words", ODD)
def test_odd_metadata_is_refused_in_one_line(tmp_path, words):
    save_checkpoint(tmp_path / "odd.pth", {"model": nn.Linear(2, 2).state_dict(), **ODD[words]})
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=f"odd.pth: {words}.*weights alone") as caught:
            load_checkpoint(tmp_path / "odd.pth", weights=weights)
        assert "\n" not in str(caught.value)


def test_what_this_project_writes_is_in_form():
    assert wrong_form({"preprocessing": TRUE, "config": {}, "class_names": ["a"]}) is None
    assert wrong_form({"model": {}, "epoch": 3, "metric": 0.9, "arch": "resnet50"}) is None


def test_lists_of_the_same_lists_are_looked_at_once():
    """Gone through one by one these are 2²¹ values."""
    looked_at = []

    class Watched(list):
        def __iter__(self):
            looked_at.append(self)
            return super().__iter__()

    deep = functools.reduce(lambda inner, _: Watched([inner, inner]), range(20), 0)
    assert wrong_form({"progress": {"epoch": 1, "samples": 1}, "versions": {"timm": deep}}) is None
    assert len(looked_at) < 100


def test_entries_of_none_are_as_if_missing(tmp_path):
    content = {"model": {"w": torch.ones(1)}, "config": None, "class_names": None, "args": None}
    save_checkpoint(tmp_path / "x.pth", content)
    assert load_checkpoint(tmp_path / "x.pth").keys() == {"model", "args"}
    with pytest.raises(CheckpointError, match="x.pth: the checkpoint holds no config, class_names"):
        load_for_inference(tmp_path / "x.pth")


def test_a_config_of_another_program_names_no_model(tmp_path):
    content = {"model": {"w": torch.ones(1)}, "config": {"model": {"name": "vit"}}}
    save_checkpoint(tmp_path / "x.pth", {**content, "class_names": ["a"], "preprocessing": TRUE})
    with pytest.raises(CheckpointError, match="x.pth: its config names no model.*--finetune"):
        load_for_inference(tmp_path / "x.pth")
