"""Sharded checkpoints: damage is found, no code is run, and one file can be made of them.

Also of tools/consolidate.py.
"""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_equal, train_together
from torch.distributed.checkpoint.metadata import Metadata

from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.folder import checkpoints_in, load_newest
from checkpointing.sharded import checksum
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


def test_damaged_metadata_is_found(sharded):
    metadata = checkpoints_in(sharded)[0] / ".metadata"
    original = metadata.read_bytes()
    metadata.write_bytes(original[:-9] + bytes([original[-9] ^ 2]) + original[-8:])
    try:
        with pytest.raises(CheckpointError, match=r"can't be read: \.metadata is damaged"):
            load_checkpoint(metadata.parent)
    finally:
        metadata.write_bytes(original)


def of_another_place(metadata: Metadata) -> Metadata:
    """Whose first part of a tensor lies outside of the folder."""
    index, place = next(iter(metadata.storage_data.items()))
    return dataclasses.replace(
        metadata,
        storage_data={
            **metadata.storage_data,
            index: dataclasses.replace(place, relative_path="../passwd"),
        },
    )


def of_another_shape(metadata: Metadata) -> Metadata:
    name, described = next(iter(metadata.state_dict_metadata.items()))
    huge = dataclasses.replace(described, size=torch.Size([1 << 40]))
    return dataclasses.replace(
        metadata, state_dict_metadata={**metadata.state_dict_metadata, name: huge}
    )


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda metadata: Hostile(), r"posix\.mkdir; refused"),
        (lambda metadata: {"a": 1}, "its metadata is of another kind"),
        (of_another_place, r"its metadata names '\.\./passwd'; refused"),
        (of_another_shape, "its metadata knows no .* of that shape"),
    ],
)
def test_hostile_metadata_is_refused(sharded, tmp_path, monkeypatch, made, reason):
    """Also where the checksums fit it."""
    monkeypatch.setenv("SHARDED_TEST_TRAP", str(tmp_path / "trap"))
    copy = tmp_path / "copy.shards"
    shutil.copytree(checkpoints_in(sharded)[0], copy)
    metadata, rest = copy / ".metadata", torch.load(copy / "rest.pth", weights_only=True)
    metadata.write_bytes(pickle.dumps(made(pickle.loads(metadata.read_bytes()))))
    save_checkpoint(
        copy / "rest.pth", rest | {"files": rest["files"] | {".metadata": checksum(metadata)}}
    )
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(copy)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("files", [None, {"../x": 1}, {"rest.pth": 1}, [1], {1: 2}])
def test_odd_checksums_are_refused(sharded, tmp_path, files):
    copy = tmp_path / "copy.shards"
    shutil.copytree(checkpoints_in(sharded)[0], copy)
    rest = torch.load(copy / "rest.pth", weights_only=True)
    save_checkpoint(copy / "rest.pth", rest | {"files": files})
    with pytest.raises(CheckpointError, match=r"rest\.pth has no checksums"):
        load_checkpoint(copy)


def test_consolidated_file_is_what_the_shards_hold(sharded, tmp_path):
    newest = checkpoints_in(sharded)[0]
    assert consolidate.main([str(newest), str(tmp_path / "one.pth")]) == 0
    one, shards = load_checkpoint(tmp_path / "one.pth"), load_checkpoint(newest)
    assert_equal(one, shards, "content")
    assert one["model"]["patch_embed.proj.weight"].dtype == torch.float32
    model = load_for_inference(tmp_path / "one.pth").model
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8))).all()
    assert consolidate.main([str(newest), str(tmp_path / "one.pth")]) == 2
