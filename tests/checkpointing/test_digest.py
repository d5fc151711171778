"""The checksum over a whole file: every bit counts, and other readers don't mind it."""

import contextlib
import hashlib
import json
import os
import random
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from checkpointing import digest
from checkpointing.digest import check_safetensors, is_verified, save_safetensors
from checkpointing.files import load_checkpoint, save_checkpoint
from errors import CheckpointError

CONTENT = {"model": {"w": torch.arange(1000.0), "b": torch.zeros(3)}, "epoch": 3}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, CONTENT)
    return path


def test_it_can_be_checked_by_hand(saved):
    data = saved.read_bytes()
    assert data[-71:].decode() == "sha256:" + hashlib.sha256(data[:-73]).hexdigest()
    assert data[-73:-71] == (71).to_bytes(2, "little")


def test_it_is_a_file_of_torch_for_all_others(saved, tmp_path):
    torch.save(CONTENT, tmp_path / "plain.pth")
    for mapped in (False, True):
        found = torch.load(saved, weights_only=True, mmap=mapped)
        assert torch.equal(found["model"]["w"], CONTENT["model"]["w"])
    with zipfile.ZipFile(saved) as ours, zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        assert ours.testzip() is None
        for name in ("data.pkl", "data/0"):
            assert ours.read(f"archive/{name}") == plain.read(f"plain/{name}")
    # Read and written again it is as any other: nothing in the content asks for a checksum.
    torch.save(torch.load(saved, weights_only=True), tmp_path / "again.pth")
    assert not is_verified(tmp_path / "again.pth")
    assert load_checkpoint(tmp_path / "again.pth").keys() == CONTENT.keys()


def test_every_bit_counts(saved):
    """All of the end, where the checksum is, and bits of everywhere."""
    data = saved.read_bytes()
    rng = random.Random(0)
    places = [8 * (len(data) - 100) + i for i in range(800)]
    for place in (*places, *(rng.randrange(8 * len(data)) for _ in range(400))):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(saved, weights=False)
        assert "\n" not in str(caught.value)
    saved.write_bytes(data)
    assert load_checkpoint(saved)["epoch"] == 3


@pytest.mark.parametrize("size", [1, 21, 22, 23, 71, 93, 94, 4000])
def test_a_file_that_is_cut_or_goes_on_is_refused(saved, size):
    data = saved.read_bytes()
    for changed in (data[:-size], data + b"\0" * size, data[size:]):
        saved.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_what_was_verified_is_read_once(saved, monkeypatch):
    reads = []
    real = hashlib.sha256
    monkeypatch.setattr(digest.hashlib, "sha256", lambda: reads.append(1) or real())
    for count in (1, 2):  # younger than a clock may show: looked at again
        assert is_verified(saved) and len(reads) == count
    monkeypatch.setattr(digest.time, "time_ns", lambda: saved.stat().st_ctime_ns + 3 * 10**9)
    for _ in range(3):
        assert is_verified(saved) and len(reads) == 3
    data = saved.read_bytes()
    with open(saved, "r+b") as file:
        file.write(bytes([data[0] ^ 1]))
    with pytest.raises(CheckpointError, match="not those that its checksum is of"):
        is_verified(saved)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    for path in (tmp_path / "x.pth", "/dev/zero"):
        with pytest.raises(CheckpointError, match="device or pipe"):
            load_checkpoint(path)


def test_safetensors_have_it_in_their_header(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, CONTENT["model"], {"note": "é"})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    given = header["__metadata__"]["sha256"].encode()
    assert header["__metadata__"]["note"] == "é"
    assert data.count(given) == 1
    assert hashlib.sha256(data.replace(given, b"0" * 64)).hexdigest().encode() == given
    assert torch.equal(load_file(path)["w"], CONTENT["model"]["w"])
    check_safetensors(path)
    rng = random.Random(0)
    for place in (*range(64), *(rng.randrange(8 * len(data)) for _ in range(300))):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        if given in damaged and b'"sha256":"' in damaged:
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
            continue
        # The checksum itself: without it the file is of another program, whose weights are whole.
        with contextlib.suppress(CheckpointError):
            assert torch.equal(load_checkpoint(path)["w"], CONTENT["model"]["w"])


def test_a_header_is_bounded(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (2, 100, 1 << 40):
        path.write_bytes(length.to_bytes(8, "little") + b"{")
        with pytest.raises(CheckpointError, match="cut off or damaged: its header has"):
            load_checkpoint(path)
