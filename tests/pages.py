"""What the tests of the pages share: their code blocks, and running their commands on tiny ones."""

import importlib
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny_sets

import main as training

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("--batch-size", "16", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"),
    *("--num-workers", "0", "--no-tensorboard", "--log-interval", "1"),
]
SMALL = ["--model", "deit_nano_patch4_32", "--input-size", "16"]


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)
    return [textwrap.dedent(block) for block in found]


def commands(page: str) -> list[str]:
    """The lines of the ``sh`` blocks."""
    return [line for block in blocks(page, "sh") for line in block.splitlines()]


def option(words: list[str], name: str) -> str | None:
    """The value after ``name`` in a command's words."""
    return words[words.index(name) + 1] if name in words else None


def shrink(command: str, *tiny: str) -> list[str]:
    """The arguments of a command with ``tiny`` added; what the command itself gives stays.

    ``tiny`` is a flat list of options, each with its values; options win that the command has.
    """
    words = shlex.split(command, comments=True)
    added: list[str] = []
    keep = True
    for word in tiny:
        if word.startswith("--"):
            keep = word not in words
        if keep:
            added.append(word)
    return words + added


def write_idx(folder: Path, part: str, count: int) -> None:
    """``count`` random images of ten classes in the files of MNIST's kind, gzipped."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
    tiny_sets.write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
    labels = (np.arange(count) % 10).astype(np.uint8)
    tiny_sets.write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)


def tool(module: str) -> Callable[[list[str]], int]:
    """``main`` of what ``python -m MODULE`` runs."""
    package = (ROOT / module.replace(".", "/")).is_dir()
    return importlib.import_module(f"{module}.__main__" if package else module).main


def run(command: str, tiny: list[str], folder: str) -> Path:
    """Run a command of a page with ``tiny`` options; returns the run's folder."""
    words = shrink(command, *tiny, "--output-dir", folder)
    if words[:2] == ["python", "main.py"]:
        main, argv = training.main, words[2:]
    else:
        assert words[:2] == ["python", "-m"]
        main, argv = tool(words[2]), words[3:]
    assert main(argv) == 0, shlex.join(words)
    return Path(option(words, "--output-dir"))


def log(folder: Path) -> list[dict]:
    """The records of ``log.txt``."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
