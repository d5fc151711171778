"""The checkpoints of a run's folder: their order, which are kept, and the best one."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.folder import (
    ON_SIGNAL,
    checkpoints_in,
    keep_newest,
    load_newest,
    name_of,
    remove_leftovers,
    set_best,
)
from errors import CheckpointError


def content(epoch: int = 1, samples: int = 0) -> dict:
    return {"model": nn.Linear(3, 2).state_dict(), "progress": {"epoch": epoch, "samples": samples}}


def save(folder: Path, content: dict, keep: int, *, best: bool = False) -> None:
    """What a writer does."""
    path = folder / f"{name_of(content)}.pth"
    save_checkpoint(path, content)
    if best:
        set_best(folder, path)
    keep_newest(folder, keep, path)


def test_newest_are_kept_in_order_of_progress(tmp_path):
    for epoch, samples in ((1, 0), (2, 0), (2, 17), (10, 0), (9, 200)):
        save(tmp_path, content(epoch, samples), keep=9)
    names = [p.name for p in checkpoints_in(tmp_path)]
    assert names == [
        "checkpoint-0010.pth",
        "checkpoint-0009-00000200.pth",
        "checkpoint-0002-00000017.pth",
        "checkpoint-0002.pth",
        "checkpoint-0001.pth",
    ]
    save(tmp_path, content(11), keep=2)
    kept = [p.name for p in checkpoints_in(tmp_path)]
    assert kept == ["checkpoint-0011.pth", "checkpoint-0010.pth"]


@pytest.mark.parametrize("links", [True, False])
def test_best_outlives_its_checkpoint(tmp_path, monkeypatch, links):
    if not links:

        def no_links(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
    first = content(1)
    save(tmp_path, first, keep=1, best=True)
    save(tmp_path, content(2), keep=1)
    best = load_checkpoint(tmp_path / "best.pth")
    assert torch.equal(best["model"]["weight"], first["model"]["weight"])
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint-0002.pth"]


def test_what_a_killed_session_left_half_written_is_removed(tmp_path):
    """And nothing else: best.pth, checkpoints and the files of others stay."""
    kept = ["best.pth", "checkpoint-0001.pth", ".bashrc", "notes.tmp", "log.tmp.txt", ".a.tmp.swp"]
    written = (".checkpoint-0002.tmp.pth", ".best.tmp.pth", ".log.tmp.txt", ".config.tmp.yaml")
    for name in (*kept, *written):
        (tmp_path / name).write_text("x")
    for name in (".checkpoint-0003.shards.tmp", ".checkpoint-0003.shards.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_latest_of_an_empty_folder_and_of_a_ruined_one(tmp_path):
    assert load_newest(tmp_path) is None
    (tmp_path / "checkpoint-0001.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_newest(tmp_path)


def test_what_a_signal_asked_for_is_passed_over_unless_nothing_else_is_there(tmp_path):
    save_checkpoint(tmp_path / "checkpoint-0002-00000008.pth", content(2, 8) | {ON_SIGNAL: True})
    save_checkpoint(tmp_path / "checkpoint-0002-00000004.pth", content(2, 4) | {ON_SIGNAL: True})
    assert load_newest(tmp_path)[0].name == "checkpoint-0002-00000008.pth"
    assert load_newest(tmp_path, regular=True)[0].name == "checkpoint-0002-00000008.pth"
    save_checkpoint(tmp_path / "checkpoint-0001.pth", content(1) | {ON_SIGNAL: False})
    assert load_newest(tmp_path, regular=True)[0].name == "checkpoint-0001.pth"
    assert load_newest(tmp_path)[0].name == "checkpoint-0002-00000008.pth"
