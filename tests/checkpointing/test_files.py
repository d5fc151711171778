"""Reading and writing checkpoints: whole or not at all, and never running what they hold."""

import argparse
import errno
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from checkpointing.files import load_checkpoint, options_of, save_checkpoint, weights_of
from errors import CheckpointError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"value": 1})

    def full(content: dict, file) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_checkpoint(path, {"value": 2})
    assert load_checkpoint(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_the_rename_comes_after_the_data_is_on_disk(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("sync"), real_sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b)))
    save_checkpoint(tmp_path / "x.pth", {})
    assert events == ["sync", "rename", "sync"]


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    hostile = Hostile(tmp_path / "trap")
    for name, write in (
        ("zip.pth", lambda p: torch.save({"model": hostile}, p)),
        ("plain.pth", lambda p: p.write_bytes(pickle.dumps({"model": hostile}))),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match="run code"):
            load_checkpoint(tmp_path / name)
    assert not hostile.trap.exists()
    pickle.loads(pickle.dumps(hostile))
    assert hostile.trap.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign zip", "list"])
def test_damaged_and_foreign_files_are_named(tmp_path, damage):
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"model": nn.Linear(3, 2).state_dict()})
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
        load_checkpoint(path)


def test_all_bytes_are_covered_by_the_checksum(tmp_path):
    """A flipped bit in a tensor is found, which torch.load alone would not notice."""
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"model": {"w": torch.arange(1000.0)}})
    data = path.read_bytes()
    at = data.index(torch.arange(1000.0).numpy().tobytes()) + 1234
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match="checksum|CRC"):
        load_checkpoint(path)


def test_prefixes_and_wrappings_of_others():
    plain = nn.Linear(3, 2).state_dict()
    wrapped = {f"module._orig_mod.{k}": v for k, v in plain.items()}
    for given in (plain, {"model": plain}, {"state_dict": wrapped, "epoch": 3}, {"model": wrapped}):
        found = weights_of(given)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[k], plain[k]) for k in plain)
    average = {k: v + 1 for k, v in plain.items()}
    for key in ("model_ema", "state_dict_ema"):
        found = weights_of({"model": plain, key: average}, ema=True)
        assert torch.equal(found["weight"], average["weight"])
    with pytest.raises(CheckpointError, match="average"):
        weights_of({"model": plain, "model_ema": None}, ema=True)
    with pytest.raises(CheckpointError, match="no weights"):
        weights_of({"epoch": 3})


def test_checkpoints_with_a_namespace_load(tmp_path):
    """DeiT's own training checkpoints hold their options that way."""
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "x")
    loaded = load_checkpoint(tmp_path / "x")
    assert loaded["args"].lr == 1.0


PLAIN = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(
    "content",
    [
        {"model_state_dict": PLAIN, "optimizer_state_dict": {"state": {}}},
        {"net": PLAIN, "acc": 93.1, "epoch": 200},
        {"network": PLAIN},
        {"module": PLAIN},
        {"model": {"state_dict": PLAIN}},
        {"teacher": PLAIN, "student": {k: 0 * v for k, v in PLAIN.items()}},
        {"student": PLAIN},
        {"ema": PLAIN},
        {"model": "resnet50", "model_ema": {f"module.{k}": v for k, v in PLAIN.items()}},
    ],
    ids=lambda content: "-".join(content),
)
def test_weights_under_the_names_of_other_programs(content, caplog):
    caplog.set_level("INFO")
    found = weights_of(content)
    assert found.keys() == PLAIN.keys() and all(torch.equal(found[k], PLAIN[k]) for k in PLAIN)
    taken = next((n for n in ("teacher", "student", "ema", "model_ema") if n in content), None)
    assert (f"the checkpoint's {taken!r}" in caplog.text) == (taken is not None)


def test_what_is_no_state_dict_is_told():
    with pytest.raises(CheckpointError, match="holds no weights: its entries are model, epoch"):
        weights_of({"model": {"w": 1.0}, "epoch": 3})
    with pytest.raises(CheckpointError, match=r"names that are no text \(0, 1\)"):
        weights_of({"model": {0: torch.ones(1), 1: torch.ones(1)}})


@pytest.mark.parametrize("zipped", [True, False])
def test_options_with_paths_and_numbers_of_numpy_are_read(tmp_path, zipped):
    """DeiT's jobs on SLURM save an output folder as a Path; an accuracy is often NumPy's."""
    options = argparse.Namespace(output_dir=tmp_path / "jobs", lr=1.0)
    content = {"model": PLAIN, "args": options, "best": np.float64(0.5), "n": np.int64(3)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / "x.pth")
    assert str(found["args"].output_dir) == str(tmp_path / "jobs") and found["best"] == 0.5
    assert not hasattr(found["args"].output_dir, "unlink")  # it can't touch files


def flipped(data: bytes, at: int, bit: int = 4) -> bytes:
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def test_without_weights_they_are_not_read(tmp_path):
    """Of a file of another program, that is: ours are compared with their checksum all the same."""
    content = {"model": {"w": torch.arange(1000.0)}, "config": {"lr": 1.0}}
    for write, path in ((torch.save, tmp_path / "x.pth"), (save_checkpoint, tmp_path / "y.pth")):
        write(*((content, path) if write is torch.save else (path, content)))
        data = path.read_bytes()
        path.write_bytes(flipped(data, data.index(content["model"]["w"].numpy().tobytes()) + 1234))
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)
    assert options_of(tmp_path / "x.pth") == {"lr": 1.0}
    with pytest.raises(CheckpointError, match="damaged"):
        options_of(tmp_path / "y.pth")


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, reason):
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"model": PLAIN})
    real = open

    def refusing(file, *arguments, **keywords):
        if str(file) == str(path):
            raise OSError(reason, os.strerror(reason), str(path))
        return real(file, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr("io.open", refusing)
    with pytest.raises(CheckpointError, match=rf"^checkpoint {path}: {os.strerror(reason)} \("):
        load_checkpoint(path)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(CheckpointError, match="File name too long .give a shorter name"):
        load_checkpoint(tmp_path / ("a" * 300))


def test_legacy_and_safetensors_formats(tmp_path):
    from safetensors.torch import save_file

    weights = {"w": torch.randn(4, 5)}
    torch.save({"model": weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "x.safetensors")
    for name in ("old.pth", "x.safetensors"):
        found = weights_of(load_checkpoint(tmp_path / name))
        assert torch.equal(found["w"], weights["w"])
