"""Every command of the pages on training, fine-tuning, resuming and extending is run."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import yaml
from after_training import make_pictures

import main as training
from optim import parameter_groups

ROOT = pages.ROOT
FASHION = "/usr/share/datasets/fashion-mnist"
TINY = [
    *("--batch-size", "16", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"),
    *("--num-workers", "0", "--no-tensorboard", "--log-interval", "1"),
]
SMALL = ["--model", "deit_nano_patch4_32", "--input-size", "16"]
# The recipes name blocks of a DeiT of twelve.
TWELVE_BLOCKS = ["--model", "deit_tiny", "--input-size", "32", "--no-pretrained"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder as the pages describe it: pets/, configs/, examples/, mine.yaml."""
    colors = {"cat": (200, 150, 30), "dog": (40, 60, 200)}
    make_pictures(tmp_path / "pets", training=32, validation=3, colors=colors)
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    [recipe] = pages.blocks("docs/train.md", "yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, tiny: list[str], folder: str) -> Path:
    """Run a command of a page with ``tiny`` options; returns the run's folder."""
    words = pages.shrink(command, *tiny, "--output-dir", folder)
    if words[:2] == ["python", "main.py"]:
        main, argv = training.main, words[2:]
    else:
        assert words[:2] == ["python", "-m"]
        main, argv = importlib.import_module(words[2]).main, words[3:]
    assert main(argv) == 0, shlex.join(words)
    return Path(pages.option(words, "--output-dir"))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def options(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_train(place, capsys):
    ran = 0
    for number, command in enumerate(pages.commands("docs/train.md")):
        # The model and the length of the page are for another machine.
        command = command.replace("--model deit_small ", "").replace("--epochs 100", "")
        folder = run(command, [*TINY, *SMALL], f"run{number}")
        said = capsys.readouterr().out
        if "--print-config" in command or "tools." in command:
            assert not folder.exists() and "deit_nano_patch4_32" in said
        else:
            assert len(log(folder)) == 1
            ran += 1
            if "mine.yaml" in command and "--mixup" not in command:
                assert options(folder)["mixup"] == 0.2
    assert ran >= 6


NUMBER = r"(\d[\d.]*(?:e[-+]\d+)?)"


def test_what_train_says_of_the_log_is_what_is_printed(place, capsys):
    """Each part of the page's two lines is printed by a run, with other numbers."""
    [example] = [block for block in pages.blocks("docs/train.md", "text") if "img/s" in block]
    run("python main.py --data-path pets", [*TINY, *SMALL], "run")
    said = capsys.readouterr().out
    for line in example.splitlines():
        for part in re.split(r" {2,}", line)[1:]:
            pieces = re.split(NUMBER, part)
            shape = "".join(NUMBER if n % 2 else re.escape(p) for n, p in enumerate(pieces))
            assert re.search(shape, said), part


def test_resume(place):
    first, again, back, other = pages.commands("docs/resume.md")
    tiny = [*TINY, *SMALL]
    tiny[tiny.index("--epochs") + 1] = "4"
    assert len(log(run(first, tiny, ""))) == 2
    folder = run(again, tiny, "")
    assert [r["epoch"] for r in log(folder)] == [0, 1, 2, 3]
    whole = log(folder)[3]
    run(back, tiny, "")
    assert list(folder.glob("set-aside/checkpoint-0004.pth"))
    # Gone over once more, the last epoch is the same.
    repeated = log(folder)[3]
    for key in ("train_loss", "test_loss", "update"):
        assert repeated[key] == whole[key]
    assert len(log(run(other, tiny, ""))) == 4


def plugins() -> dict[str, str]:
    """Name and content of the files that docs/extend.md shows."""
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+\.py)`[^`]*```python\n(.*?)^```", text, re.M | re.S)
    assert len(found) == len(pages.blocks("docs/extend.md", "python"))
    return dict(found)


def test_extend(place, capsys):
    for name, content in plugins().items():
        Path(name).write_text(content)
    for part in ("train", "val"):
        (place / "pets-flat" / part).mkdir(parents=True)
        for path in (place / "pets" / part).rglob("*.png"):
            shutil.copy(path, place / "pets-flat" / part / f"{path.parent.name}_{path.name}")
    for command in pages.commands("docs/extend.md"):
        own_model = "--model" in command
        if "--eval" in command:
            assert training.main(shlex.split(command)[2:]) == 0
        elif "tools." in command:
            explore = importlib.import_module("tools.data.__main__").main
            assert explore(shlex.split(command)[3:]) == 0
        else:
            run(command, [*TINY, *(["--input-size", "16"] if own_model else SMALL)], "")
    said = capsys.readouterr().out
    assert "my_model" in said and "plain" in said and "striped" in said
    assert log(Path("output/named"))[0]["train_loss"] > 0


POLY = """
import torch, main, losses
logits, targets = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
p = logits.softmax(1)[range(5), targets]
wanted = (-p.log() + 1 - p).mean()
torch.testing.assert_close(losses.PolyLoss()(None, logits, targets), wanted)
raise SystemExit(main.main({argv}))
"""


def test_the_patch_for_a_loss_applies_and_trains(place):
    copy = place / "copy"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    [patch] = pages.blocks("docs/extend.md", "diff")
    subprocess.run(["git", "apply", "-"], input=patch, text=True, check=True, cwd=copy)
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    asked = re.search(r"`(--loss poly)`", text)[1].split()
    argv = [*asked, "--data-path", str(place / "pets"), *TINY, *SMALL, "--output-dir", "run"]
    code = POLY.format(argv=argv)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=copy, capture_output=True)
    assert options(copy / "run")["loss"] == "poly" and len(log(copy / "run")) == 1


def test_finetune(place):
    fashion = place / "fashion"
    for part, count in (("train", 30), ("t10k", 20)):
        pages.write_idx(fashion, part, count)
    ran = []
    for command in pages.commands("docs/finetune.md"):
        command = command.replace(FASHION, str(fashion))
        recipe = pages.option(shlex.split(command), "--config")
        if recipe and "finetune" in recipe:
            folder = run(command, [*TINY, *TWELVE_BLOCKS], f"output/{Path(recipe).stem}")
        else:
            folder = run(command, TINY, "")
        assert len(log(folder)) == 1
        ran.append(folder.name)
    assert {"fmnist_teacher", "finetune_frozen", "finetune_layerwise"} <= set(ran)


@pytest.mark.parametrize(
    "recipe, learning",
    (("frozen", {0: "head."}), ("gradual", {0: "head. norm.", 5: "blocks.8. blocks.11."})),
)
def test_recipes_free_what_they_say(recipe, learning):
    import models
    from optim import Freezer

    options = training.load_config(["--config", str(ROOT / f"configs/finetune_{recipe}.yaml")])
    model = models.build_model("deit_tiny", 3, input_size=32)
    freezer = Freezer(model, freeze=options.model.freeze, unfreeze_at=options.model.unfreeze_at)
    for epoch, prefixes in learning.items():
        freezer.apply(epoch)
        free = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(any(n.startswith(p) for n in free) for p in prefixes.split())
        assert not any(n.startswith(("blocks.0.", "blocks.7.", "patch_embed.")) for n in free)
    if recipe == "gradual":
        freezer.apply(10)
        assert all(p.requires_grad for p in model.parameters())


def test_layerwise_recipe_slows_the_patch_embedding_to_two_percent():
    import models

    recipe = training.load_config(["--config", str(ROOT / "configs/finetune_layerwise.yaml")])
    model = models.build_model("deit_small", 3, input_size=224)
    groups = parameter_groups(model, weight_decay=0, layer_decay=recipe.optim.layer_decay)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scale[id(model.head.weight)] == 1
    assert scale[id(model.patch_embed.proj.weight)] == pytest.approx(0.75**13)
    assert (
        f"0.75^13 = {0.75**13:.0%}".replace("%", " %")
        in (ROOT / "configs/finetune_layerwise.yaml").read_text()
    )
