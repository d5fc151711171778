"""docs/train.md: its commands are run, its lines of a log are what a run prints."""

import re

import pages
import yaml
from pages import SMALL, TINY, log, run


def test_train(before_training, capsys):
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
                assert yaml.safe_load((folder / "config.yaml").read_text())["mixup"] == 0.2
    assert ran >= 6


NUMBER = r"(\d[\d.]*(?:e[-+]\d+)?)"


def test_what_train_says_of_the_log_is_what_is_printed(before_training, capsys):
    """Each part of the page's two lines is printed by a run, with other numbers."""
    [example] = [block for block in pages.blocks("docs/train.md", "text") if "img/s" in block]
    run("python main.py --data-path pets", [*TINY, *SMALL], "run")
    said = capsys.readouterr().out
    for line in example.splitlines():
        for part in re.split(r" {2,}", line)[1:]:
            pieces = re.split(NUMBER, part)
            shape = "".join(NUMBER if n % 2 else re.escape(p) for n, p in enumerate(pieces))
            assert re.search(shape, said), part
