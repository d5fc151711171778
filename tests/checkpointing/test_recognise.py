"""What is given as a checkpoint and is none: each file is named for what it is."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.recognise import what_it_is
from errors import CheckpointError


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    return file.getvalue()


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("best.pth"))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


FILES = {
    "Git LFS pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
    "an HTML page.*direct link": b"\n <!DOCTYPE html><html><body>Log in</body></html>",
    "HTML page or XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a PNG image": image("PNG"),
    "a JPEG image": image("JPEG"),
    "a WebP image": image("WEBP"),
    "a PDF document": b"%PDF-1.7\n",
    "a gzip archive: unpack it": gzip.compress(b"x"),
    "a tar archive: unpack it": tarred(),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\4",
    "a zip archive of images": zipped("train/cat/0.jpg"),
    "a zip archive that torch.save did not": zipped("best.pth"),
    "NumPy arrays": npz(),
    "an HDF5 file.*Keras": b"\x89HDF\r\n\x1a\n\0\0",
    "a Keras model": zipped("config.json", "model.weights.h5"),
    "an ONNX model": b"\x08\x07\x12\x07pytorch",
    "msgpack.*Flax": b"\x81\xa6params\x81\xa4head\x01",
    "is JSON": b'{"epochs": 3}',
    "a YAML file.*--config": b"model: deit_tiny\nlr: 1e-3\n",
    "a CSV file": b"path,label\ncat.jpg,cat\n",
    "a text file": b"e",
    "a text file: ": "größer\n".encode(),
    "a Python pickle": pickle.dumps({"a": 1}),
    "Python pickle that": pickle.dumps({"a": 1}, protocol=0),
    "is empty": b"",
    "zeros alone": bytes(5000),
    "begins with the bytes ff fe fa fb": b"\xff\xfe\xfa\xfb\x00\x01" * 300,
}


@pytest.mark.parametrize("words", FILES)
def test_a_file_is_named_for_what_it_is(tmp_path, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(FILES[words])
    with pytest.raises(CheckpointError, match=f"checkpoint {path} .*{words}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_checkpoints_are_not_taken_for_others(tmp_path):
    from safetensors.torch import save_file

    weights = nn.Linear(3, 2).state_dict()
    torch.save(weights, tmp_path / "new.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "x.safetensors")
    assert [what_it_is(path) for path in tmp_path.iterdir()] == [None] * 3


def test_a_wrong_suffix_is_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match="is a safetensors file: name it best.safetensors"):
        load_checkpoint(tmp_path / "best.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="torch.save's, not safetensors: name it x.pth"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_named(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.torchscript"))
    with pytest.raises(CheckpointError, match="TorchScript archive: name the checkpoint"):
        load_checkpoint(tmp_path / "x.torchscript")


def test_a_download_that_was_cut_off(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"model": nn.Linear(30, 20).state_dict()})
    for size in (1000, path.stat().st_size - 30):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"is cut off, .* after {size} bytes"):
            load_checkpoint(path)


def test_a_folder_names_the_checkpoints_in_it(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder without a checkpoint"):
        load_checkpoint(tmp_path)
    for name in ("best", "checkpoint-0001", "checkpoint-0002"):
        save_checkpoint(tmp_path / f"{name}.pth", {})
    expected = f"is a folder: .* {tmp_path}/best.pth or {tmp_path}/checkpoint-0002.pth$"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(tmp_path)
