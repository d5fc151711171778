"""Every recipe takes two real steps: tiny pictures, and small siblings of the largest models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import main
import models
import utils

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = {
    "deit_base_patch16_224": "deit_tiny",
    "deit_base_patch16_384": "deit_tiny",
    "deit_base_distilled_patch16_224": "deit_tiny_distilled",
    "deit_base_distilled_patch16_384": "deit_tiny_distilled",
    "deit3_base_patch16_224": "deit3_small_patch16_224",
    "cait_S24_224": "cait_XXS24_224",
    "cait_S24": "cait_XXS24",
    # Of patches that don't fit 32 pixels.
    "micro_deit_distilled": "deit_nano_distilled_patch4_32",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Four training and two validation pictures."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)).save(
            root / f"{name}.jpg"
        )
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(models.build_model("modern_lenet", 2, input_size=32).state_dict(), path)
    return path


@pytest.mark.parametrize("recipe", sorted(p.stem for p in ROOT.glob("configs/*.yaml")))
def test_recipe_takes_two_steps(pictures, teacher, tmp_path, monkeypatch, recipe):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, content: saved.append((path, content)))
    monkeypatch.setattr(checkpoint, "set_best", lambda folder, path: None)
    monkeypatch.chdir(ROOT)
    config = f"configs/{recipe}.yaml"
    asked = main.load_config(["--config", config])
    argv = ["--config", config, "--data-path", str(pictures), "--output-dir", str(tmp_path)]
    argv += ["--data-set", "IMNET", "--input-size", "32", "--batch-size", "2", "--epochs", "1"]
    argv += ["--warmup-epochs", "0", "--num-workers", "0", "--device", "cpu", "--no-tensorboard"]
    argv += [
        "--cooldown-epochs",
        "0",
        "--min-lr",
        "0",
        "--finetune",
        "",
        "--no-pretrained",
        "--log-interval",
        "1",
    ]
    utils.import_plugins(asked.run.plugin)
    name = models.resolve_name(asked.model.model)
    argv += ["--model", SIBLINGS.get(name, name)]
    if asked.loss.distillation_type != "none":
        argv += ["--teacher-model", "modern_lenet", "--teacher-path", str(teacher)]
    assert main.main(argv) == 0
    [(_, content)] = saved
    assert content["progress"]["update"] == 2 / asked.optim.accum_steps
    assert content["progress"]["skipped"] == 0
    assert all(torch.isfinite(v).all() for v in content["model"].values())
