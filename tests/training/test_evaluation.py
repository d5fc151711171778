"""--eval: of checkpoints and bare weights, on sets with and without a training part."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CLASSES, arguments, train

import main
from checkpointing.files import load_checkpoint
from inference import load_for_inference


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The folder of a run of one epoch; its best.pth is not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(images, folder, "--epochs", "1", "--warmup-epochs", "0") == 0
    return folder


def test_results_are_those_of_the_images_one_by_one(images, trained, tmp_path, capsys):
    """Loss, accuracy and each class's row against a plain loop over files, for EMA and model."""
    argv = ["--eval", "--resume", str(trained / "best.pth"), "--output-dir", str(tmp_path)]
    assert main.main(argv) == 0
    shown = capsys.readouterr().out
    for ema, name in ((False, "model"), (True, "EMA")):
        model, transform, names = load_for_inference(trained / "best.pth", ema=ema)
        assert names == list(CLASSES)
        losses, rows = [], []
        for label, class_name in enumerate(CLASSES):
            right = 0
            paths = sorted((images / "val" / class_name).iterdir())
            for path in paths:
                with torch.no_grad():
                    logits = model(transform(Image.open(path).convert("RGB"))[None])[0].double()
                losses.append(float(logits.exp().sum().log() - logits[label]))
                right += int(logits.argmax()) == label
            rows.append([class_name, len(paths), right, f"{100 * right / len(paths):.2f}"])
        accuracy = 100 * sum(row[2] for row in rows) / len(losses)
        line = rf"^{name} +top-1 {accuracy:.3f} %  loss ([\d.]+)  \(8 images\)$"
        loss = float(re.search(line, shown, re.M)[1])
        assert loss == pytest.approx(np.mean(losses), abs=1e-4)
        with open(tmp_path / f"eval_{name.lower()}_per_class.csv", newline="") as file:
            table = list(csv.reader(file))
        assert table == [
            ["class", "images", "correct", "accuracy"],
            *([str(value) for value in row] for row in rows),
        ]


def test_evaluation_writes_nothing_but_its_tables(images, trained, tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}
    argv = ["--eval", "--resume", str(trained / "best.pth"), "--output-dir", str(tmp_path / "new")]
    assert main.main(argv) == 0
    assert {p.name: p.stat().st_mtime_ns for p in trained.iterdir()} == before
    written = {p.name for p in (tmp_path / "new").iterdir()}
    assert written == {"eval_model_per_class.csv", "eval_ema_per_class.csv"}


def test_auto_evaluates_the_best_else_the_newest(images, tmp_path, capsys):
    assert train(images, tmp_path, "--epochs", "2") == 0
    argv = arguments(images, tmp_path, "--eval", "--resume", "auto")
    capsys.readouterr()
    assert main.main(argv) == 0
    assert f"{tmp_path / 'best.pth'} on 8 images of 3 classes" in capsys.readouterr().out
    (tmp_path / "best.pth").unlink()
    assert main.main(argv) == 0
    assert f"{tmp_path / 'checkpoint-0002.pth'} on 8 images" in capsys.readouterr().out
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    assert main.main(argv) == 2
    assert f"there is no checkpoint in {tmp_path}" in capsys.readouterr().err


def test_eval_takes_what_is_asked_for(images, tmp_path, capsys):
    options = ("--model", "modern_lenet", "--input-size", "32", "--epochs", "2")
    assert train(images, tmp_path / "run", *options) == 0
    best = str(tmp_path / "run" / "best.pth")
    shown = {}
    for change in ((), ("--input-size", "24"), ("--mean", "0.9"), ("--eval-crop-ratio", "0.5")):
        capsys.readouterr()
        assert main.main(["--eval", "--resume", best, *change]) == 0
        shown[change] = re.search(r"model .*loss ([\d.]+)", capsys.readouterr().out)[1]
    assert len(set(shown.values())) >= 3
    assert shown[("--input-size", "24")] != shown[()] != shown[("--mean", "0.9")]
    assert main.main(["--eval", "--resume", best, "--model", "simple_cnn"]) == 2
    assert "holds modern_lenet" in capsys.readouterr().err


def test_eval_of_bare_weights_takes_the_model_from_the_command_line(
    images, trained, tmp_path, capsys
):
    content = load_checkpoint(trained / "best.pth")
    torch.save({"model": content["model"]}, tmp_path / "published.pth")
    argv = arguments(images, tmp_path / "run", "--eval", "--resume")
    assert main.main([*argv, str(tmp_path / "published.pth")]) == 0
    assert f"top-1 {content['metrics']['test_acc1']:.3f} %" in capsys.readouterr().out
    assert main.main([*argv, str(tmp_path / "published.pth"), "--model", "modern_lenet"]) == 2


def test_eval_of_a_transformer_at_another_size(trained, tmp_path):
    argv = ["--eval", "--resume", str(trained / "best.pth"), "--output-dir", str(tmp_path)]
    assert main.main([*argv, "--input-size", "16"]) == 0


def test_eval_needs_no_training_part(images, trained, tmp_path, capsys):
    shutil.copytree(images / "val", tmp_path / "only" / "val")
    lines = ["path,label", *(f"val/amber/{i}.png,amber" for i in range(3))]
    (tmp_path / "only" / "some.csv").write_text("\n".join(lines))
    places = (("only",), ("only/val",), ("only/some.csv", "--data-set", "CSV"))
    for place, *more in places:
        argv = ["--eval", "--resume", str(trained / "best.pth")]
        argv += ["--data-path", str(tmp_path / place), "--output-dir", str(tmp_path), *more]
        assert main.main(argv) == 0
        assert f"({3 if more else 8} images)" in capsys.readouterr().out


def test_eval_names_what_it_could_not_read(images, trained, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "blue" / "1.png").write_bytes(b"nothing")
    argv = ["--eval", "--resume", str(trained / "best.pth"), "--output-dir", str(tmp_path)]
    argv += ["--data-path", str(tmp_path / "data")]
    assert main.main([*argv, "--on-bad-image", "skip"]) == 0
    shown = capsys.readouterr().out
    assert "(7 images)" in shown and "1 images could not be read" in shown
    assert "blue/1.png" in shown


def test_eval_on_other_classes_is_refused(images, trained, tmp_path, capsys):
    argv = ["--eval", "--resume", str(trained / "best.pth"), "--output-dir", str(tmp_path)]
    assert main.main([*argv, "--data-set", "DIGITS"]) == 2
    error = capsys.readouterr().err
    assert "(0, 1, 2, … 10 in all)" in error and "(amber, blue, crimson)" in error
    shutil.copytree(images / "val", tmp_path / "val")
    (tmp_path / "val" / "blue").rename(tmp_path / "val" / "green")
    assert main.main([*argv, "--data-path", str(tmp_path / "val")]) == 2
    assert "which has no green: --class-map FILE" in capsys.readouterr().err
    # A checkpoint knows its classes where only its weights are taken, too.
    argv = arguments(tmp_path, tmp_path / "run", "--eval", "--finetune", str(trained / "best.pth"))
    assert main.main(argv) == 2
    assert "which has no green: --class-map FILE" in capsys.readouterr().err
