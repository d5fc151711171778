"""Sharded checkpoints: damage is found, no code is run, and one file can be made of them."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from runs import assert_equal, train_together

from checkpointing.files import load_checkpoint
from checkpointing.folder import checkpoints_in, load_newest
from errors import CheckpointError
from inference import load_for_inference
from tools import consolidate


@pytest.fixture(scope="module")
def sharded(images, tmp_path_factory) -> Path:
    """The folder of a run on two processes."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    train_together(images, folder, "--epochs", "2", "--fsdp", "--amp", "bf16", "--keep", "2")
    return folder


def test_a_damaged_shard_is_found_and_passed_over(sharded, caplog):
    newest, before = checkpoints_in(sharded)
    file = newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        assert load_newest(sharded)[0] == before
        assert "__1_0.distcp is damaged" in caplog.text
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(newest)
    finally:
        file.write_bytes(original)
    assert load_newest(sharded)[0] == newest


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["SHARDED_TEST_TRAP"],)


def test_hostile_metadata_is_refused(sharded, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDED_TEST_TRAP", str(tmp_path / "trap"))
    newest = checkpoints_in(sharded)[0]
    metadata = newest / ".metadata"
    original = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Hostile()))
    try:
        # Older versions of torch lose the reason on the way.
        reason = r"posix\.mkdir; refused|can't be read: metadata is None"
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(newest)
    finally:
        metadata.write_bytes(original)
    assert not (tmp_path / "trap").exists()


def test_consolidated_file_is_what_the_shards_hold(sharded, tmp_path):
    newest = checkpoints_in(sharded)[0]
    assert consolidate.main([str(newest), str(tmp_path / "one.pth")]) == 0
    one, shards = load_checkpoint(tmp_path / "one.pth"), load_checkpoint(newest)
    assert_equal(one, shards, "content")
    assert one["model"]["patch_embed.proj.weight"].dtype == torch.float32
    model = load_for_inference(tmp_path / "one.pth").model
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8))).all()
    assert consolidate.main([str(newest), str(tmp_path / "one.pth")]) == 2
