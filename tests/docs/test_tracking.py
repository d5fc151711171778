"""docs/tracking.md: its command is tracked, its files are there."""

import re

import pages
from pages import SMALL, TINY, run


def test_tracking(before_training, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # folders that importing W&B makes
    [command] = pages.commands("docs/tracking.md")
    folder = run(command.replace("--model deit_small ", ""), [*TINY, *SMALL], "run")
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    page = (pages.ROOT / "docs" / "tracking.md").read_text()
    head, _, _ = page.partition("## Trackers")
    files = set(re.findall(r"^\| `([\w./]+)` \|", head, re.M))
    assert {"run.log", "log.txt", "wandb/"} <= files
    here = {p.name + "/" * p.is_dir() for p in folder.iterdir()}
    # No TensorBoard in a tiny run; its curves and a profile weren't drawn.
    assert files - here <= {"curves.png", "tensorboard/", "profile/"}
