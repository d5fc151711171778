"""docs/extend.md: its plugins, its patch and its commands work as they stand."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import yaml
from pages import ROOT, SMALL, TINY, log, run

import main


def plugins() -> dict[str, str]:
    """Name and content of the files that docs/extend.md shows."""
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+\.py)`[^`]*```python\n(.*?)^```", text, re.M | re.S)
    assert len(found) == len(pages.blocks("docs/extend.md", "python"))
    return dict(found)


def test_extend(before_training, capsys):
    for name, content in plugins().items():
        Path(name).write_text(content)
    for path in Path("pets").rglob("*.png"):
        part, label, name = path.relative_to("pets").parts
        flat = Path("pets-flat", part, f"{label}_{name}")
        flat.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, flat)
    for command in pages.commands("docs/extend.md"):
        own_model = "--model" in command
        if "--eval" in command:
            assert main.main(shlex.split(command)[2:]) == 0
        elif "tools." in command:
            assert pages.tool("tools.data")(shlex.split(command)[3:]) == 0
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


def test_the_patch_for_a_loss_applies_and_trains(before_training):
    copy = before_training / "copy"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for path in ROOT.glob("*/__init__.py"):
        shutil.copytree(path.parent, copy / path.parent.name)
    [patch] = pages.blocks("docs/extend.md", "diff")
    subprocess.run(["git", "apply", "-"], input=patch, text=True, check=True, cwd=copy)
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    asked = re.search(r"`(--loss poly)`", text)[1].split()
    data = ("--data-path", str(before_training / "pets"))
    argv = [*asked, *data, *TINY, *SMALL, "--output-dir", "run"]
    code = POLY.format(argv=argv)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=copy, capture_output=True)
    saved = yaml.safe_load((copy / "run" / "config.yaml").read_text())
    assert saved["loss"] == "poly" and len(log(copy / "run")) == 1
