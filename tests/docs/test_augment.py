"""docs/augment.md: its commands and files work as they stand."""

import re
import runpy
from pathlib import Path

import pages
import pytest
from pages import SMALL, TINY, log, run
from PIL import Image

from config import by_name


def test_augment(before_training, monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    pytest.importorskip("albumentations")
    text = (pages.ROOT / "docs" / "augment.md").read_text(encoding="utf-8")
    files = re.findall(r"`(\w+\.py)`[^`]*```python\n(.*?)^```", text, re.M | re.S)
    assert [name for name, _ in files] == ["own_transforms.py", "write_pipeline.py"]
    for name, content in files:
        Path(name).write_text(content)
    runpy.run_path("write_pipeline.py")
    ran = 0
    for number, command in enumerate(pages.commands("docs/augment.md")):
        if "tools." in command:
            words = command.split()
            assert pages.tool("tools.data")([*words[3:], *TINY, *SMALL]) == 0
            assert Image.open(words[-1]).width > 3 * 96
        elif "main.py" in command:
            ran += 1
            folder = run(command, [*TINY, *SMALL], f"run{number}")
            assert log(folder)[0]["train_loss"] > 0
    assert ran == 4


def test_its_table_names_options():
    text = (pages.ROOT / "docs" / "augment.md").read_text(encoding="utf-8")
    for name in re.findall(r"`--([\w-]+)", text):
        assert name in ("images", "draws", "mix", "output") or by_name(name)
