"""tools.average: means, counters, batch-norm statistics."""

import shutil

import pytest
import torch

from checkpointing.files import load_checkpoint, save_checkpoint
from checkpointing.folder import checkpoints_in
from inference import load_for_inference
from tools import average


@pytest.mark.parametrize("part", ["model", "model_ema"])
def test_weights_are_means_and_counters_the_last_ones(cnn_run, tmp_path, part):
    argv = [str(cnn_run), "--last", "2", "--output", str(tmp_path / "mean.pth")]
    assert average.main(argv + (["--ema"] if part == "model_ema" else [])) == 0
    content = load_checkpoint(tmp_path / "mean.pth")
    first, second = (load_checkpoint(p)[part] for p in checkpoints_in(cnn_run)[::-1])
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


def test_best_is_by_the_metric(cnn_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    losses = {3: 0.5, 4: 0.1, 5: None, 6: 0.3, 7: 0.9}
    for epoch, loss in losses.items():
        metrics = {} if loss is None else {"test_loss": loss, "test_acc1": 100 * loss}
        weights = {"w": torch.tensor([float(epoch)])}
        content = {"model": weights, "metrics": metrics}
        save_checkpoint(folder / f"checkpoint-{epoch:04d}.pth", content)

    def epochs(count, metric=None):
        return [int(p.stem[-4:]) for p in average.chosen(folder, count, best=metric)]

    assert epochs(2) == [6, 7]
    assert epochs(2, "test_loss") == [4, 6]
    assert epochs(2, "test_acc1") == [3, 7]
    with pytest.raises(average.UserError, match="holds 4 checkpoints with test_loss, not 5"):
        epochs(5, "test_loss")


def test_batch_norm_statistics_are_those_of_the_images(cnn_run, images, tmp_path):
    output = tmp_path / "mean.pth"
    argv = [cnn_run, "--last", "2", "--output", output, "--update-bn", "--num-workers", "0"]
    assert average.main([*map(str, argv), "--batch-size", "8", "--device", "cpu"]) == 0
    model, transform, names = load_for_inference(output)
    files = [p for n in names for p in sorted((images / "train" / n).iterdir())]
    from PIL import Image

    batch = torch.stack([transform(Image.open(p)) for p in files])
    with torch.no_grad():
        means = [model.conv1[0](chunk).mean((0, 2, 3)) for chunk in batch.split(8)]
    torch.testing.assert_close(model.conv1[1].running_mean, sum(means) / 3, atol=1e-5, rtol=1e-4)


def test_different_models_are_refused(cnn_run, tmp_path, capsys):
    shutil.copy(checkpoints_in(cnn_run)[::-1][0], tmp_path / "one.pth")
    content = load_checkpoint(tmp_path / "one.pth")
    content["model"]["fc.weight"] = torch.zeros(3, 7)
    save_checkpoint(tmp_path / "two.pth", content)
    argv = [str(tmp_path / n) for n in ("one.pth", "two.pth")]
    assert average.main([*argv, "--output", str(tmp_path / "mean.pth")]) == 2
    assert "fc.weight differs" in capsys.readouterr().err
    content["class_names"] = ["a", "b", "c"]
    save_checkpoint(tmp_path / "two.pth", content)
    assert average.main([*argv, "--output", str(tmp_path / "mean.pth")]) == 2
    assert "other classes" in capsys.readouterr().err
    assert not (tmp_path / "mean.pth").exists()


def test_an_existing_file_stays(cnn_run, tmp_path, capsys):
    (tmp_path / "mean.pth").write_text("mine")
    assert average.main([str(cnn_run), "--last", "2", "--output", str(tmp_path / "mean.pth")]) == 2
    assert (tmp_path / "mean.pth").read_text() == "mine"
    assert average.main([str(cnn_run), "--output", str(tmp_path / "new.pth")]) == 2
    assert "--last K or --best K" in capsys.readouterr().err
