"""Reading and writing checkpoints: whole or not at all, and never running what they hold."""

import argparse
import functools
import hashlib
import http.server
import os
import pickle
import shutil
import ssl
import subprocess
import threading
import zipfile

import pytest
import torch
from torch import nn

import checkpoint
from errors import CheckpointError


def content(epoch: int = 1, samples: int = 0) -> dict:
    return {"model": nn.Linear(3, 2).state_dict(), "progress": {"epoch": epoch, "samples": samples}}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoint.save(path, {"value": 1})

    def full(content: dict, file) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        checkpoint.save(path, {"value": 2})
    assert checkpoint.load_file(path) == {"value": 1}


def test_the_rename_comes_after_the_data_is_on_disk(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("sync"), real_sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b)))
    checkpoint.save(tmp_path / "x.pth", {})
    assert events == ["sync", "rename", "sync"]


def test_newest_are_kept_in_order_of_progress(tmp_path):
    for epoch, samples in ((1, 0), (2, 0), (2, 17), (10, 0), (9, 200)):
        checkpoint.save_in_folder(tmp_path, content(epoch, samples), keep=9, best=False)
    names = [p.name for p in checkpoint.in_folder(tmp_path)]
    assert names == [
        "checkpoint-0010.pth",
        "checkpoint-0009-00000200.pth",
        "checkpoint-0002-00000017.pth",
        "checkpoint-0002.pth",
        "checkpoint-0001.pth",
    ]
    checkpoint.save_in_folder(tmp_path, content(11), keep=2, best=False)
    kept = [p.name for p in checkpoint.in_folder(tmp_path)]
    assert kept == ["checkpoint-0011.pth", "checkpoint-0010.pth"]


@pytest.mark.parametrize("links", [True, False])
def test_best_outlives_its_checkpoint(tmp_path, monkeypatch, links):
    if not links:

        def no_links(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
    first = content(1)
    checkpoint.save_in_folder(tmp_path, first, keep=1, best=True)
    checkpoint.save_in_folder(tmp_path, content(2), keep=1, best=False)
    best = checkpoint.load_file(tmp_path / "best.pth")
    assert torch.equal(best["model"]["weight"], first["model"]["weight"])
    assert [p.name for p in checkpoint.in_folder(tmp_path)] == ["checkpoint-0002.pth"]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    for name, write in (
        ("zip.pth", lambda p: torch.save({"model": Hostile()}, p)),
        ("plain.pth", lambda p: p.write_bytes(pickle.dumps({"model": Hostile()}))),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match="run code|can't be read"):
            checkpoint.load_file(tmp_path / name)
    assert not os.path.exists("/tmp/this-must-not-run")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign zip", "list"])
def test_damaged_and_foreign_files_are_named(tmp_path, damage):
    path = tmp_path / "x.pth"
    checkpoint.save(path, content())
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("epoch: 3\n")
    elif damage == "foreign zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    else:
        torch.save([1, 2, 3], path)
    with pytest.raises(CheckpointError, match="x.pth"):
        checkpoint.load_file(path)


def test_all_bytes_are_covered_by_the_checksum(tmp_path):
    """A flipped bit in a tensor is found, which torch.load alone would not notice."""
    path = tmp_path / "x.pth"
    checkpoint.save(path, {"model": {"w": torch.arange(1000.0)}})
    data = path.read_bytes()
    at = data.index(torch.arange(1000.0).numpy().tobytes()) + 1234
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match="checksum|CRC"):
        checkpoint.load_file(path)


def test_prefixes_and_wrappings_of_others():
    plain = nn.Linear(3, 2).state_dict()
    wrapped = {f"module._orig_mod.{k}": v for k, v in plain.items()}
    for given in (plain, {"model": plain}, {"state_dict": wrapped, "epoch": 3}, {"model": wrapped}):
        found = checkpoint.weights_of(given)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[k], plain[k]) for k in plain)
    average = {k: v + 1 for k, v in plain.items()}
    for key in ("model_ema", "state_dict_ema"):
        found = checkpoint.weights_of({"model": plain, key: average}, ema=True)
        assert torch.equal(found["weight"], average["weight"])
    with pytest.raises(CheckpointError, match="average"):
        checkpoint.weights_of({"model": plain, "model_ema": None}, ema=True)
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint.weights_of({"epoch": 3})


def test_checkpoints_with_a_namespace_load(tmp_path):
    """DeiT's own training checkpoints hold their options that way."""
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "x")
    loaded = checkpoint.load_file(tmp_path / "x")
    assert loaded["args"].lr == 1.0


def test_legacy_and_safetensors_formats(tmp_path):
    from safetensors.torch import save_file

    weights = {"w": torch.randn(4, 5)}
    torch.save({"model": weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "x.safetensors")
    for name in ("old.pth", "x.safetensors"):
        found = checkpoint.weights_of(checkpoint.load_file(tmp_path / name))
        assert torch.equal(found["w"], weights["w"])


def test_urls_https_only_and_fetched_once(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="https"):
        checkpoint.load_file("http://example.org/x.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fetched = []

    def download(url: str, target: str) -> None:
        fetched.append(url)
        torch.save({"model": {"w": torch.ones(1)}}, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert "model" in checkpoint.load_file("https://example.org/deit.pth?download=1")
    assert fetched == ["https://example.org/deit.pth?download=1"]

    def unreachable(url: str, target: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match="no route.*give a file"):
        checkpoint.load_file("https://example.org/other.pth")


@pytest.fixture
def https(tmp_path, monkeypatch):
    """A real https server on this machine with one checkpoint; its address and the file."""
    folder = tmp_path / "served"
    folder.mkdir()
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"model": {"w": torch.ones(3)}}, folder / "small.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}/small.pth", folder / "small.pth"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_a_checksum_is_compared_with_what_came(https, tmp_path):
    url, file = https
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    cached = tmp_path / "hub" / "checkpoints" / "small.pth"
    with pytest.raises(CheckpointError, match=f"its sha256 is {right}, expected 00000000"):
        checkpoint.load_file(f"{url}#sha256=0000000000")
    assert not cached.exists()
    assert "w" in checkpoint.load_file(f"{url}#sha256={right[:12].upper()}")["model"]
    cached.write_bytes(cached.read_bytes()[:-1])  # spoilt since
    with pytest.raises(CheckpointError, match="its sha256 is"):
        checkpoint.load_file(f"{url}#sha256={right}")
    with pytest.raises(CheckpointError, match="hexadecimal"):
        checkpoint.load_file(f"{url}#md5=0123456789")
    with pytest.raises(CheckpointError, match="can't be fetched"):
        checkpoint.load_file(url.replace("small", "absent"))
    assert list(cached.parent.iterdir()) == []  # nothing half


def test_latest_of_an_empty_folder_and_of_a_ruined_one(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    (tmp_path / "checkpoint-0001.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.load_latest(tmp_path)
