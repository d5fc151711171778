"""checkpointing/address.py: checkpoints by https, with their checksums."""

import hashlib
import shutil

import pytest
import torch
from https_server import content, serving, trusted_certificate

from checkpointing.files import load_checkpoint
from errors import CheckpointError


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/x.pth", "only https"),
        ("ftp://example.org/x.pth", "only https"),
        ("file:///x.pth", "only https"),
        ("https://example.org/", "names no file"),
        ("https://example.org/..", "names no file"),
        ("https://[::1/x.pth", "is no address"),
        ("https://example.org:x/a.pth", "is no address"),
        ("https://me:secret@example.org/a.pth", "user's name"),
        ("https://example.org/x.pth#md5=0123456789", "hexadecimal"),
        ("https://example.org/x\x1b[2J.pth#y", r"x\\x1b\[2J"),
    ],
)
def test_addresses_that_are_not_fetched(url, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(url)


@pytest.fixture
def https(tmp_path, monkeypatch):
    """A server by https, the folder of its copies, and the bytes of a checkpoint."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl for a certificate")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "small.pth")
    with serving(trusted_certificate(tmp_path, monkeypatch)) as served:
        yield served, tmp_path / "hub" / "checkpoints", (tmp_path / "small.pth").read_bytes()


def copies(folder):
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_checksum_is_compared_with_what_came(https):
    server, folder, file = https
    right = hashlib.sha256(file).hexdigest()
    names = ("/small.pth", f"/small-{right[:8]}.pth", "/small-00000000.pth")
    server.answers |= {name: content(file) for name in names}
    url = f"{server.address}/small.pth"
    with pytest.raises(CheckpointError, match=f"its sha256 is {right}, expected 00000000"):
        load_checkpoint(f"{url}#sha256=0000000000")
    with pytest.raises(CheckpointError, match="expected 00000000"):
        load_checkpoint(f"{server.address}/small-00000000.pth")
    assert copies(folder) == []
    assert "w" in load_checkpoint(f"{url}#sha256={right[:12].upper()}")["model"]
    assert "w" in load_checkpoint(f"{server.address}/small-{right[:8]}.pth")["model"]
    assert "w" in load_checkpoint(url)["model"]
    assert server.asked["/small.pth"] == 2  # once for the wrong checksum
    (cached,) = (p for p in copies(folder) if p.name == "small.pth")
    cached.write_bytes(cached.read_bytes()[:-1])  # spoilt since
    with pytest.raises(CheckpointError, match="its sha256 is"):
        load_checkpoint(f"{url}#sha256={right}")
    assert "w" in load_checkpoint(f"{url}#sha256={right}")["model"]  # fetched anew


def test_a_file_that_lies_there_already_is_taken_if_its_checksum_proves_it(https):
    """Who has no network puts it there by hand, as torch.hub did."""
    server, folder, file = https
    right = hashlib.sha256(file).hexdigest()
    folder.mkdir(parents=True)
    (folder / "small.pth").write_bytes(file)
    url = f"{server.address}/small.pth"
    assert "w" in load_checkpoint(f"{url}#sha256={right[:16]}")["model"]
    assert server.asked["/small.pth"] == 0
    # Without a checksum, and with that of another file, it may be anything.
    for unproven in (url, f"{url}#sha256=00000000"):
        with pytest.raises(CheckpointError, match="404"):
            load_checkpoint(unproven)
    assert (folder / "small.pth").read_bytes() == file


def test_what_can_not_be_fetched(https):
    server, folder, _ = https
    with pytest.raises(CheckpointError, match="answers 404 Not Found; give a file in its place"):
        load_checkpoint(f"{server.address}/absent.pth")
    server.answers["/page.pth"] = content(b"<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(CheckpointError, match=r"page.pth can't be fetched: it is an HTML page"):
        load_checkpoint(f"{server.address}/page.pth")
    assert copies(folder) == []
