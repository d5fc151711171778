"""tools.inspect: what files hold, layers, gradients."""

import json

import pytest
import torch
import torch.nn.functional as F

from checkpointing.files import load_checkpoint
from checkpointing.folder import checkpoints_in
from inference import load_for_inference
from tools import inspect


def look(capsys, *argv) -> dict:
    assert inspect.main([*map(str, argv), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_a_checkpoint_holds(cnn_run, capsys):
    path = checkpoints_in(cnn_run)[::-1][-1]
    found = look(capsys, path)
    assert found["bytes"] == path.stat().st_size
    assert (found["epoch"], found["update"], found["samples"]) == (2, 8, 0)
    assert found["classes"] == ["amber", "blue", "crimson"]
    assert found["options"]["model"] == "resnet10t" and "opt" not in found["options"]
    content = load_checkpoint(path)
    assert found["metrics"] == content["metrics"]
    tensors = content["model"].values()
    assert found["parts"]["model"] == sum(t.nbytes for t in tensors)
    assert found["values"] == sum(t.numel() for t in tensors)
    assert inspect.main([str(path), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "fc.weight" in text and "3×512" in text and "not finite    nothing" in text


def test_layers_are_described_and_bad_values_found(tmp_path, capsys):
    weight = torch.tensor([[1.0, 2.0], [6.0, float("nan")]], dtype=torch.float16)
    torch.save({"a.weight": weight, "steps": torch.tensor(3)}, tmp_path / "weights.pth")
    found = look(capsys, tmp_path / "weights.pth")
    assert found["nonfinite"] == ["a.weight"]
    first, second = found["layers"]
    assert first == {
        "name": "a.weight",
        "shape": [2, 2],
        "parameters": 4,
        "dtype": "float16",
        "mean": 3.0,
        "std": pytest.approx((14 / 3) ** 0.5),
        "nonfinite": 1,
    }
    assert (second["shape"], second["mean"], second["dtype"]) == ([], 3.0, "int64")


def test_weights_of_others_are_read(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "theirs.safetensors")
    assert look(capsys, tmp_path / "theirs.safetensors")["values"] == 3
    torch.save({"state_dict": {"module.x": torch.ones(2)}, "epoch": 7}, tmp_path / "timm.pth")
    found = look(capsys, tmp_path / "timm.pth")
    assert found["epoch"] == 7 and found["layers"][0]["name"] == "x"
    (tmp_path / "junk.pth").write_text("junk")
    assert inspect.main([str(tmp_path / "junk.pth")]) == 2


def test_gradients_of_a_batch(cnn_run, images, tmp_path, capsys):
    path = checkpoints_in(cnn_run)[::-1][-1]
    argv = [path, "--gradients", tmp_path / "flow.png", "--num-workers", "0", "--batch-size", "18"]
    found = look(capsys, *argv)
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    model, transform, names = load_for_inference(path)
    from PIL import Image

    files = [(p, i) for i, n in enumerate(names) for p in sorted((images / "val" / n).iterdir())]
    batch = torch.stack([transform(Image.open(p)) for p, _ in files])
    F.cross_entropy(model(batch), torch.tensor([i for _, i in files])).backward()
    assert [g["name"] for g in found["gradients"]] == [n for n, _ in model.named_parameters()]
    for given, parameter in zip(found["gradients"], model.parameters(), strict=True):
        rms = parameter.grad.double().pow(2).mean() ** 0.5
        assert given["gradient"] == pytest.approx(float(rms), rel=1e-3)
