"""training/options.py: which options of a checkpoint a command line goes on with."""

import sys

import pytest
import torch

from errors import CheckpointError
from training.options import options_of_checkpoint


def saved(path, config):
    torch.save({"model": {"w": torch.zeros(1)}, "config": config}, path)
    return {"resume": str(path)}


def test_a_checkpoint_brings_its_options_and_folder_but_names_no_code(tmp_path):
    given = saved(tmp_path / "a.pth", {"model": "resnet18", "plugin": ["evil.py"], "no_option": 1})
    assert options_of_checkpoint(given) == {"model": "resnet18", "output_dir": str(tmp_path)}


def test_the_options_of_another_program_are_refused(tmp_path):
    given = saved(tmp_path / "a.pth", {"model": {"name": "resnet18"}})
    with pytest.raises(CheckpointError, match="another program's.*--finetune"):
        options_of_checkpoint(given)


def test_a_published_model_names_itself():
    assert options_of_checkpoint({"resume": "timm/resnet18"}) == {"model": "resnet18"}


@pytest.mark.parametrize("given", [{}, {"resume": ""}, {"resume": "auto"}])
def test_without_a_checkpoint_nothing_is_imported(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "checkpointing.files", None)  # importing it raises
    assert options_of_checkpoint(given) == {}
