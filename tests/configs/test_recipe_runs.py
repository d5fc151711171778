"""Every recipe takes two real steps: tiny images, and small siblings of the largest models."""

from pathlib import Path

import pytest
import torch
from tiny_images import image_folder

import main
import models
from training.plugins import import_plugins

ROOT = Path(__file__).resolve().parents[2]
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
TINY = [
    *("--data-set", "IMNET", "--input-size", "32", "--batch-size", "2", "--epochs", "1"),
    *("--warmup-epochs", "0", "--cooldown-epochs", "0", "--min-lr", "0", "--log-interval", "1"),
    *("--finetune", "", "--no-pretrained", "--num-workers", "0", "--device", "cpu"),
    "--no-tensorboard",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four training and two validation images: folders, and lists for several labels."""
    root = tmp_path_factory.mktemp("images")
    image_folder(root, {"train": 2, "val": 1}, classes=("a", "b"), suffix=".jpg")
    for part in ("train", "val"):
        paths = sorted((root / part).rglob("*.jpg"))
        rows = [f"{path.relative_to(root)},{path.parent.name}|c" for path in paths]
        (root / f"{part}.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(models.build_model("modern_lenet", 2, input_size=32).state_dict(), path)
    return path


@pytest.mark.parametrize("recipe", sorted(p.stem for p in ROOT.glob("configs/*.yaml")))
def test_recipe_takes_two_steps(images, teacher, tmp_path, monkeypatch, recipe):
    saved = []
    monkeypatch.setattr(
        "checkpointing.writer.save_checkpoint", lambda path, content: saved.append((path, content))
    )
    monkeypatch.setattr("checkpointing.writer.set_best", lambda folder, path: None)
    monkeypatch.chdir(ROOT)
    config = f"configs/{recipe}.yaml"
    asked = main.load_config(["--config", config])
    argv = ["--config", config, "--data-path", str(images), "--output-dir", str(tmp_path), *TINY]
    import_plugins(asked.run.plugin)
    name = models.resolve_name(asked.model.model)
    argv += ["--model", SIBLINGS.get(name, name)]
    if asked.data.task == "multilabel":
        argv += ["--data-set", "CSV"]
    if asked.loss.distillation_type != "none":
        argv += ["--teacher-model", "modern_lenet", "--teacher-path", str(teacher)]
    assert main.main(argv) == 0
    [(_, content)] = saved
    assert content["progress"]["update"] == 2 / asked.optim.accum_steps
    assert content["progress"]["skipped"] == 0
    assert all(torch.isfinite(v).all() for v in content["model"].values())
