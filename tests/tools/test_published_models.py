"""The tools take published models as they take checkpoints; here one of ImageNet's classes."""

import csv
import json
import os
import re

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from serving import running
from tiny_images import image_folder

import main
from inference import load_for_inference
from tools import explain, export, inspect, predict, report

IDS = {"n01440764": "tench", "n02012849": "crane (n02012849)", "n03126707": "crane (n03126707)"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    """A model of 1000 classes in timm's hub form, without names."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published") / "tiny"
    folder.mkdir()
    model = timm.create_model("test_efficientnet")
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 48, 48], "crop_pct": 0.9, "num_classes": 1000}
    config = {"architecture": "test_efficientnet", "num_classes": 1000, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Validation images in folders named by WordNet ids."""
    return image_folder(tmp_path_factory.mktemp("imagenet"), {"val": 2}, classes=tuple(IDS))


def test_it_predicts_by_names(published, imagenet, capsys):
    assert predict.main([published, str(imagenet / "val"), "--format", "json"]) == 0
    model, transform, names = load_for_inference(published)
    for answer in json.loads(capsys.readouterr().out):
        with Image.open(answer["file"]) as image:
            logits = model(transform(image.convert("RGB"))[None])[0]
        assert answer["predictions"][0]["class"] == names[int(logits.argmax())]


def test_it_is_evaluated_on_folders_of_wordnet_ids(published, imagenet, tmp_path, capsys):
    argv = [published, "--device", "cpu", "--num-workers", "0", "--output", str(tmp_path)]
    assert report.main(argv) == 2
    error = "error: --data-path: what it was trained on isn't known here: add it\n"
    assert capsys.readouterr().err == error
    assert report.main([*argv, "--data-path", str(imagenet)]) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["images"] == 6
    with open(tmp_path / "confusion.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert {row[0] for row in rows if any(int(cell) for cell in row[1:])} == set(IDS.values())


def test_other_folders_are_refused(published, images, tmp_path, capsys):
    argv = [published, "--device", "cpu", "--num-workers", "0", "--output", str(tmp_path)]
    assert report.main([*argv, "--data-path", str(images)]) == 2
    assert "are not the model's 1000 (tench, goldfish, great white shark" in capsys.readouterr().err


def test_classes_without_names_are_taken_in_the_order_of_the_set(images, tmp_path, capsys):
    """In the report as in --eval; 0, 1, 10 is the order of text."""
    folder = tmp_path / "three"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(
        timm.create_model("test_efficientnet", num_classes=3).state_dict(),
        folder / "model.safetensors",
    )
    cfg = {"input_size": [3, 48, 48], "num_classes": 3}
    config = {"architecture": "test_efficientnet", "num_classes": 3, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    rest = ("--device", "cpu", "--num-workers", "0")
    argv = (str(folder), *rest, "--output", str(tmp_path), "--data-path")
    assert report.main([*argv, str(images)]) == 0
    assert "taken in the order of the set" in capsys.readouterr().err
    accuracy = json.loads((tmp_path / "report.json").read_text())["top1"]
    evaluate = ("--eval", "--resume", str(folder), "--data-path", str(images), *rest)
    assert main.main([*evaluate, "--output-dir", str(tmp_path / "eval")]) == 0
    shown = re.search(r"top-1 ([\d.]+) %", capsys.readouterr().out)[1]
    assert float(shown) == pytest.approx(100 * accuracy, abs=1e-2)
    text = image_folder(tmp_path / "text", {"val": 1}, classes=("9", "10", "11"))
    assert report.main([*argv, str(text)]) == 2
    assert "give their numbers leading zeros" in capsys.readouterr().err
    more = image_folder(tmp_path / "more", {"val": 1}, classes=("a", "b", "c", "d"))
    assert report.main([*argv, str(more)]) == 2
    assert "the 4 classes of" in capsys.readouterr().err


def test_it_is_exported_explained_and_looked_into(published, imagenet, tmp_path, capsys):
    argv = [published, "--format", "safetensors", "hub", "--output", str(tmp_path / "deploy")]
    assert export.main(argv) == 0
    names = load_for_inference(published).class_names
    for suffix in ("safetensors", "hub"):
        again = load_for_inference(tmp_path / "deploy" / f"tiny.{suffix}")
        assert again.class_names == names
    image = str(next((imagenet / "val").glob("*/*.png")))
    argv = [published, image, "--class", "tench", "--output", str(tmp_path / "why")]
    assert explain.main(argv) == 0
    assert (tmp_path / "why" / "explain.html").exists()
    capsys.readouterr()
    assert inspect.main([published, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == names and found["preprocessing"]["input_size"] == 48
    assert found["bytes"] == sum(entry.stat().st_size for entry in os.scandir(published))


def test_it_is_served(published):
    with running(published) as (service, _):
        assert service.classifier.class_names[134] == IDS["n02012849"]


def test_one_that_cannot_be_had_is_one_line(capsys):
    for tool in (predict, report, explain, export):
        extra = ["x.png"] if tool in (predict, explain) else []
        assert tool.main(["timm/resnot50", *extra]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: timm/resnot50: unknown model") and error.count("\n") == 1
