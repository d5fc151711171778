"""Archives without a checksum of the whole: what torch's own reader would take for sound."""

import io
import struct
import zipfile

import pytest
import torch

from checkpointing import archive
from checkpointing.files import load_checkpoint
from errors import CheckpointError

WEIGHTS = {"w": torch.arange(1000.0), "v": torch.arange(1000.0) + 1}


@pytest.fixture
def path(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def central(data: bytes, name: str) -> int:
    """Where the list of entries has the entry."""
    at = data.rindex(name.encode())
    return data.rindex(b"PK\x01\x02", 0, at)


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def test_what_torch_wrote_is_sound(path):
    archive.check_archive(path)
    assert torch.equal(load_checkpoint(path)["w"], WEIGHTS["w"])


def test_an_entry_marked_as_a_folder_is_not_read_as_nothing(path):
    """One flipped bit: torch's reader then leaves the memory as it was."""
    data = path.read_bytes()
    at = central(data, "x/data/0") + 38  # external attributes
    path.write_bytes(changed(data, at, bytes([data[at] | 0x10])))
    with pytest.raises(CheckpointError, match="x/data/0 is marked as a folder"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("field", "new", "words"),
    [
        (8, struct.pack("<H", 1), "is encrypted"),
        (10, struct.pack("<H", 8), "is compressed, and torch.save never"),
        (20, struct.pack("<I", 8), "is compressed, and torch.save never"),
        (16, struct.pack("<I", 1), "Bad CRC-32"),
        (46, b"y", "has another header than the list"),
    ],
    ids=["flags", "method", "size", "crc", "name"],
)
def test_entries_are_as_their_headers_say(path, field, new, words):
    data = path.read_bytes()
    path.write_bytes(changed(data, central(data, "x/data/0") + field, new))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_no_entry_lies_in_another(path):
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        first, second = (file.getinfo(f"x/data/{i}").header_offset for i in range(2))
    moved = central(data, "x/data/1") + 42
    path.write_bytes(changed(data, moved, struct.pack("<I", first + 4)))
    assert second > first
    with pytest.raises(CheckpointError, match="is not where the entry before it ends"):
        load_checkpoint(path)


def test_a_name_comes_once(path):
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as file:
        file.writestr("x/data/0", bytes(4000))
    with pytest.raises(CheckpointError, match="two of its entries have the same name"):
        load_checkpoint(path)


def test_a_bomb_is_not_unpacked(path, monkeypatch):
    """A gigabyte of zeros in a megabyte; and a list of entries beyond all bounds."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as file:
        for entry in source.infolist():
            file.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    bomb = path.with_name("bomb.pth")
    bomb.write_bytes(packed.getvalue())
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(CheckpointError, match="data.pkl is compressed, and torch.save never"):
        load_checkpoint(bomb)
    monkeypatch.setattr(archive, "DIRECTORY_LIMIT", 100)
    with pytest.raises(CheckpointError, match="list of entries has .* over the limit of 100"):
        load_checkpoint(path)


def test_nothing_follows_the_end(path):
    path.write_bytes(path.read_bytes() + b"sha256:")
    with pytest.raises(CheckpointError, match="end record is not at its end"):
        load_checkpoint(path)
