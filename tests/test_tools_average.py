"""tools.average and tools.inspect: means, counters, statistics; what files hold; gradients."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from after_training import make_pictures, train

import checkpoint
from inference import load_for_inference
from tools import average, inspect

CNN = ("--model", "resnet10t", "--input-size", "32", "--keep", "9")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The folder of a run whose model has batch norm; both epochs are kept."""
    return train(pictures, tmp_path_factory.mktemp("run"), *CNN).parent


def paths(run):
    return checkpoint.in_folder(run)[::-1]


# --- average --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "model_ema"])
def test_weights_are_means_and_counters_the_last_ones(run, tmp_path, part):
    argv = [str(run), "--last", "2", "--output", str(tmp_path / "mean.pth")]
    assert average.main(argv + (["--ema"] if part == "model_ema" else [])) == 0
    content = checkpoint.load_file(tmp_path / "mean.pth")
    first, second = (checkpoint.load_file(p)[part] for p in paths(run))
    assert content["averaged"] == ["checkpoint-0001.pth", "checkpoint-0002.pth"]
    counters = 0
    for name, value in content["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)
        else:
            counters += 1
            assert value.dtype == second[name].dtype and value == second[name] != first[name]
    assert counters > 0
    model, transform, names = load_for_inference(tmp_path / "mean.pth")
    assert names == ["amber", "blue", "crimson"]
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


def test_half_precision_is_summed_in_double():
    weights = [{"w": torch.tensor([x], dtype=torch.float16)} for x in (60000.0, 60000.0, 30000.0)]
    assert average.average(weights)["w"] == torch.tensor(50000, dtype=torch.float16)


def test_best_is_by_the_metric(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    losses = {3: 0.5, 4: 0.1, 5: None, 6: 0.3, 7: 0.9}
    for epoch, loss in losses.items():
        metrics = {} if loss is None else {"test_loss": loss, "test_acc1": 100 * loss}
        weights = {"w": torch.tensor([float(epoch)])}
        content = {"model": weights, "metrics": metrics}
        checkpoint.save(folder / f"checkpoint-{epoch:04d}.pth", content)

    def epochs(count, metric=None):
        return [int(p.stem[-4:]) for p in average.chosen(folder, count, best=metric)]

    assert epochs(2) == [6, 7]
    assert epochs(2, "test_loss") == [4, 6]
    assert epochs(2, "test_acc1") == [3, 7]
    with pytest.raises(average.UserError, match="holds 4 checkpoints with test_loss, not 5"):
        epochs(5, "test_loss")


def test_batch_norm_statistics_are_those_of_the_pictures(run, pictures, tmp_path):
    output = tmp_path / "mean.pth"
    argv = [run, "--last", "2", "--output", output, "--update-bn", "--num-workers", "0"]
    assert average.main([*map(str, argv), "--batch-size", "8", "--device", "cpu"]) == 0
    model, transform, names = load_for_inference(output)
    files = [p for n in names for p in sorted((pictures / "train" / n).iterdir())]
    from PIL import Image

    images = torch.stack([transform(Image.open(p)) for p in files])
    with torch.no_grad():
        means = [model.conv1[0](chunk).mean((0, 2, 3)) for chunk in images.split(8)]
    torch.testing.assert_close(model.conv1[1].running_mean, sum(means) / 3, atol=1e-5, rtol=1e-4)


def test_different_models_are_refused(run, tmp_path, capsys):
    shutil.copy(paths(run)[0], tmp_path / "one.pth")
    content = checkpoint.load_file(tmp_path / "one.pth")
    content["model"]["fc.weight"] = torch.zeros(3, 7)
    checkpoint.save(tmp_path / "two.pth", content)
    argv = [str(tmp_path / n) for n in ("one.pth", "two.pth")]
    assert average.main([*argv, "--output", str(tmp_path / "mean.pth")]) == 2
    assert "fc.weight differs" in capsys.readouterr().err
    content["class_names"] = ["a", "b", "c"]
    checkpoint.save(tmp_path / "two.pth", content)
    assert average.main([*argv, "--output", str(tmp_path / "mean.pth")]) == 2
    assert "other classes" in capsys.readouterr().err
    assert not (tmp_path / "mean.pth").exists()


def test_an_existing_file_stays(run, tmp_path, capsys):
    (tmp_path / "mean.pth").write_text("mine")
    assert average.main([str(run), "--last", "2", "--output", str(tmp_path / "mean.pth")]) == 2
    assert (tmp_path / "mean.pth").read_text() == "mine"
    assert average.main([str(run), "--output", str(tmp_path / "new.pth")]) == 2
    assert "--last K or --best K" in capsys.readouterr().err


# --- inspect --------------------------------------------------------------------------------------


def look(capsys, *argv) -> dict:
    assert inspect.main([*map(str, argv), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_a_checkpoint_holds(run, capsys):
    path = paths(run)[-1]
    found = look(capsys, path)
    assert found["bytes"] == path.stat().st_size
    assert (found["epoch"], found["update"], found["samples"]) == (2, 8, 0)
    assert found["classes"] == ["amber", "blue", "crimson"]
    assert found["options"]["model"] == "resnet10t" and "opt" not in found["options"]
    content = checkpoint.load_file(path)
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
        "name": "a.weight", "shape": [2, 2], "parameters": 4, "dtype": "float16", "mean": 3.0,
        "std": pytest.approx((14 / 3) ** 0.5), "nonfinite": 1,
    }  # fmt: skip
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


def test_gradients_of_a_batch(run, pictures, tmp_path, capsys):
    path = paths(run)[-1]
    argv = [path, "--gradients", tmp_path / "flow.png", "--num-workers", "0", "--batch-size", "18"]
    found = look(capsys, *argv)
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    model, transform, names = load_for_inference(path)
    from PIL import Image

    files = [(p, i) for i, n in enumerate(names) for p in sorted((pictures / "val" / n).iterdir())]
    images = torch.stack([transform(Image.open(p)) for p, _ in files])
    F.cross_entropy(model(images), torch.tensor([i for _, i in files])).backward()
    assert [g["name"] for g in found["gradients"]] == [n for n, _ in model.named_parameters()]
    for given, parameter in zip(found["gradients"], model.parameters(), strict=True):
        rms = parameter.grad.double().pow(2).mean() ** 0.5
        assert given["gradient"] == pytest.approx(float(rms), rel=1e-3)
