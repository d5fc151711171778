"""docs/images.md: its commands work as they stand, on images of five bands."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pages
import pytest
from pages import SMALL, TINY
from runs import newest


def test_the_commands_of_the_page_work(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 3)):
        for name in ("corn", "wheat"):
            folder = Path("fields", part, name)
            folder.mkdir(parents=True)
            for i in range(count):
                bands = rng.integers(0, 50 * np.arange(1, 6), (20, 24, 5)).astype(np.uint8)
                tifffile.imwrite(
                    folder / f"{i}.tif", bands, photometric="minisblack", planarconfig="contig"
                )
    written = io.StringIO()
    for command in pages.commands("docs/images.md"):
        words = command.split()
        if words[1] == "main.py":
            command = command.replace("--model deit_small", " ".join(SMALL))
            pages.run(command, TINY, words[-1])
            continue
        more = [] if "explore" in words else ["--device", "cpu"]
        with contextlib.redirect_stdout(written):
            assert pages.tool(words[2])([*words[3:], *more]) == 0
    mean = newest(Path("output/fields"))["preprocessing"]["mean"]
    assert np.abs(255 * np.array(mean) - (25 * np.arange(1, 6) - 0.5)).max() < 3
    assert all(
        f"{name}/{i}.tif" in written.getvalue() for name in ("corn", "wheat") for i in range(3)
    )
