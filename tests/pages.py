"""What the tests of the pages share: their code blocks, and running their commands on tiny ones."""

import gzip
import re
import shlex
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


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
    """``count`` random pictures of ten classes in the files of MNIST's kind, gzipped."""
    rng = np.random.default_rng(0)
    arrays = {
        "images-idx3": rng.integers(0, 255, (count, 28, 28), dtype=np.uint8),
        "labels-idx1": (np.arange(count) % 10).astype(np.uint8),
    }
    folder.mkdir(exist_ok=True)
    for kind, array in arrays.items():
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
            file.write(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
