"""docs/models.md: its commands work as they stand."""

import pages
import pytest
from pages import TINY, log, run

pytest.importorskip("peft")


def test_models(before_training) -> None:
    ran = 0
    for number, command in enumerate(pages.commands("docs/models.md")):
        if "main.py" in command:
            folder = run(command, [*TINY, "--no-model-ema", "--input-size", "32"], f"run{number}")
            assert log(folder)[0]["train_loss"] > 0
            ran += 1
        else:
            words = command.replace("'", "").split()
            assert pages.tool("tools.models")(words[3:]) == 0
    assert ran == 5
