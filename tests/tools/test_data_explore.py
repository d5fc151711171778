"""tools.data explore: what it finds in a data set.

Also of tools/common/recipe.py and tools/data/facts.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_parts import CLASSES, save
from PIL import Image
from runs import train

from main import load_config
from tools import doctor
from tools.common.stage import single_process
from tools.data.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--model", "simple_cnn", "--epochs", "1", "--warmup-epochs", "0", "--no-repeated-aug")


def test_findings_are_the_same_in_the_run_in_doctor_and_in_explore(pets, tmp_path, capsys, caplog):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train/bee/self").symlink_to(".")
    save(root / "val/loose.jpg", np.full((20, 30), 51))
    loop = f"warning: {root}/train: 1 link leads to a folder above, or to one that is counted"
    loose = f"warning: {root}/val: 1 images lie beside the class folders: not used"
    options = ["--data-path", str(root), "--output-dir", str(tmp_path / "report")]
    for command in (lambda: main(["explore", *options]), lambda: said_by_doctor(options)):
        assert command() == 0
        said = capsys.readouterr().out
        assert loop in said and loose in said
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert all(f"warning: {text}".startswith((loop, loose)) for text in report["warnings"][:2])
    assert train(root, tmp_path / "run", *TINY) == 0
    for line in (loop, loose):
        assert any(f"warning: {text}".startswith(line) for text in caplog.messages)


def said_by_doctor(options: list[str]) -> int:
    """What the check of data prints."""
    config = load_config(options)
    with single_process(config) as (config, processes, device):
        for line in doctor.check_data(doctor.PlannedRun(config, processes, device, Path("x"))):
            print(line)
    return 0


def test_explore_finds_what_is_wrong_with_a_set(pets, tmp_path, capsys):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train/bee/bad.jpg").write_bytes(b"\xff\xd8 not an image")
    (root / "train/bee/copy.jpg").write_bytes((root / "train/ant/1.jpg").read_bytes())
    (root / "val/cat/leak.jpg").write_bytes((root / "train/cat/7.jpg").read_bytes())
    save(root / "train/cat/grey.png", np.full((20, 30), 51))
    assert (
        main(["explore", "--data-path", str(root), "--output-dir", str(tmp_path / "report")]) == 0
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    train, val = report["parts"]["train"], report["parts"]["val"]
    assert train["images"] == train["read"] == 33 and val["images"] == 7
    assert train["classes"] == {"ant": 10, "bee": 12, "cat": 11}
    assert train["modes"] == {"RGB": 31, "L": 1}
    assert train["formats"] == {"JPEG": 31, "PNG": 1}
    assert (train["width"]["min"], train["width"]["max"]) == (30, 60)
    assert (train["height"]["min"], train["height"]["median"]) == (20, 40)
    [damaged] = train["damaged"]
    assert damaged["image"].endswith("train/bee/bad.jpg") and "BytesIO" not in damaged["reason"]
    [group] = train["duplicates"]
    assert [Path(p).name for p in group["images"]] == ["1.jpg", "copy.jpg"]
    assert group["classes"] == ["ant", "bee"] and val["duplicates"] == []
    [leak] = report["leak"]
    assert leak["val"].endswith("leak.jpg") and leak["train"].endswith("7.jpg")
    assert leak["same_class"] is True
    said = "\n".join(report["warnings"])
    for words in ("1 image can't be read", "under more than one class", "validation part in"):
        assert words in said
    assert said.splitlines() == [
        line.removeprefix("warning: ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("warning: ")
    ]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 0 and page.count("data:image/svg+xml") == 2
    assert page.count("data:image/png") == len(CLASSES)
    assert "bad.jpg" in page and "leak.jpg" in page and "http://" not in page


@pytest.mark.parametrize(("background", "value"), [("black", 0.0), ("drop", 1.0)])
def test_explore_counts_images_with_transparency(pets, tmp_path, background, value):
    root = shutil.copytree(pets, tmp_path / "pets")
    shutil.rmtree(root / "val/ant")
    (root / "val/ant").mkdir()
    for alpha in (0, 254, 255):
        Image.new("RGBA", (20, 30), (255, 255, 255, alpha)).save(root / f"val/ant/{alpha}.png")
    argv = ["--data-path", str(root), "--output-dir", str(tmp_path / "report")]
    assert main(["explore", *argv, "--background", background]) == 0
    parts = json.loads((tmp_path / "report" / "report.json").read_text())["parts"]
    assert (parts["train"]["transparent"], parts["val"]["transparent"]) == (0, 2)
    assert "with transparency" in (tmp_path / "report" / "report.html").read_text()
    assert parts["val"]["brightness"]["min" if value == 0 else "max"] == pytest.approx(value)


def test_explore_measures_as_numpy_does(pets, tmp_path):
    assert main(["explore", "--data-path", str(pets), "--output-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["warnings"] == [] and report["leak"] == []
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(pets.glob("train/*/*.jpg"))]) / 255
    assert np.allclose(report["parts"]["train"]["mean"], pixels.mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(report["parts"]["train"]["std"], pixels.std((0, 1, 2)), atol=1e-4)
    brightness = pixels.mean((1, 2, 3))
    told = report["parts"]["train"]["brightness"]
    assert told["median"] == pytest.approx(np.median(brightness), abs=1e-5)
    assert told["max"] == pytest.approx(brightness.max(), abs=1e-5)


def test_explore_reads_sets_of_pixels_and_a_part_of_them(tmp_path):
    argv = ["explore", "--data-set", "DIGITS", "--output-dir", str(tmp_path), "--limit", "50"]
    assert main(argv) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    train = report["parts"]["train"]
    assert (train["images"], train["read"]) == (1438, 50) and train["modes"] == {"L": 50}
    assert train["width"]["max"] == 8 and sum(train["classes"].values()) == 50
