"""docs/evaluate.md: the commands for ImageNet's variants are run on a few images of each form."""

import json
import subprocess

import pytest
import shades
from pages import blocks
from timm.data import ImageNetInfo

import main

IDS = ImageNetInfo().label_names()
PUBLISHED = "--pretrained --model deit_small_patch16_224"


@pytest.fixture
def sets(tmp_path, monkeypatch) -> str:
    """The working directory with a set of each form; returns a file of weights."""
    named = {IDS[4]: [4], IDS[9]: [9, 8]}
    shades.images(tmp_path / "imagenet" / "val", named, "ILSVRC2012_val_{:08d}.png")
    shades.images(tmp_path / "imagenet" / "train", named)
    (tmp_path / "real.json").write_text(json.dumps([[4], [], [8]]))
    numbered = {str(i): [] for i in range(1000)} | {"11": [11], "2": [2, 2]}
    shades.images(tmp_path / "imagenetv2-matched-frequency-format-val", numbered)
    for part in ("imagenet-a", "imagenet-r", "imagenette2-320/train", "imagenette2-320/val"):
        shades.images(tmp_path / part, named)
    (tmp_path / "imagenet-a" / "README.txt").write_text("about it")
    monkeypatch.chdir(tmp_path)
    return shades.weights(tmp_path / "w.pth")


def test_commands_of_the_page_work(sets, capsys):
    [block] = [block for block in blocks("docs/evaluate.md", "bash") if "imagenet-a" in block]
    for line in block.splitlines():
        if not line.startswith("python main.py "):
            subprocess.run(["bash", "-c", line], check=True)
            continue
        assert PUBLISHED in line
        argv = line.removeprefix("python main.py ").replace(PUBLISHED, f"--resume {sets}").split()
        assert main.main([*argv, *shades.OPTIONS]) == 0
        out = capsys.readouterr().out
        if "imagenetv2" in line or "--valid-labels" in line:
            assert "top-1 100.000 %" in out
        else:
            assert "model  top-1 66.667 %" in out
        assert ("ReaL top-1 100.000 %" in out) == ("--real-labels" in line)
