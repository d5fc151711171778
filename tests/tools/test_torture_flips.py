"""Damaged checkpoints: what ``python -m tools.torture flips`` counts, at a small size."""

import pytest
import torch

from checkpointing.files import save_checkpoint
from tools.torture import flips
from tools.torture.flips import Subject, attack, same

WEIGHTS = {"w": torch.arange(2000.0)}


@pytest.fixture
def subjects(tmp_path):
    save_checkpoint(tmp_path / "ours.pth", {"model": WEIGHTS, "config": {"lr": 0.1}})
    old = {"model": WEIGHTS}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    return Subject("ours", tmp_path / "ours.pth", True), Subject("old", tmp_path / "old.pth", False)


def test_ours_are_refused_and_left_as_they_were(subjects):
    before = [subject.path.read_bytes() for subject in subjects]
    results = [attack(subject, 60, 6, 0, [subject.path]) for subject in subjects]
    ours, old = (result.counts for result in results)
    assert ours == {"refused": 66, "equal": 0, "different": 0, "errors": 0}
    # A file that holds the bare bytes can't know.
    assert sum(old.values()) == 66 and old["different"] > 20 and old["errors"] == 0
    assert [result.broken for result in results] == [0, 0]
    assert [subject.path.read_bytes() for subject in subjects] == before


def test_a_broken_promise_is_counted(subjects, monkeypatch):
    monkeypatch.setattr(flips, "END", 10**9)  # anywhere alike
    monkeypatch.setattr("checkpointing.files.is_verified", lambda path: True)
    said = []
    result = attack(subjects[0], 40, 4, 0, [subjects[0].path], say=said.append)
    assert result.broken > 20 and len(said) == result.broken


def test_what_is_the_same():
    nan = {"a": [1.0, float("nan")], "w": torch.zeros(2)}
    assert same(nan, {"a": [1.0, float("nan")], "w": torch.zeros(2)})
    for other in (
        {"a": [1.0, 2.0], "w": torch.zeros(2)},
        {"a": (1.0, float("nan")), "w": torch.zeros(2)},
        {**nan, "w": -torch.zeros(2)},
        {**nan, "w": torch.zeros(2, dtype=torch.int32)},
        {**nan, "w": torch.zeros(2, 1)},
        {**nan, "w": None},
    ):
        assert not same(nan, other)
