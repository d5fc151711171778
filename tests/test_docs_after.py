"""Every command of the pages on judging and exporting is run, from a folder as they describe it."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from after_training import make_pictures, train
from pages import ROOT, blocks, commands
from PIL import Image

PAGES = ("docs/judge.md", "docs/export.md")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pets/, pictures.csv and output/pets, in which the commands are run in turn."""
    root = tmp_path_factory.mktemp("place")
    colors = {"cat": (200, 150, 30), "dog": (40, 60, 200)}
    make_pictures(root / "pets", colors=colors)
    (root / "pictures.csv").write_text("path\npets/val/cat/0.png\n")
    with contextlib.chdir(root):
        train(Path("pets"), Path("output/pets"), "--epochs", "3", "--keep", "9")
    return root


def run(line: str) -> int:
    """Run a line of a page: one of our commands, fed by a pipe, its output to a file."""
    line, _, target = line.partition(" > ")
    feeding, _, command = line.rpartition(" | ")
    python, module_flag, module, *argv = shlex.split(command)
    assert (python, module_flag) == ("python", "-m")
    fed = subprocess.run(["bash", "-c", feeding], capture_output=True, text=True, check=True).stdout
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.stdin", io.StringIO(fed))
        code = importlib.import_module(module).main(argv)
    assert out.getvalue()
    if target:
        Path(target).write_text(out.getvalue())
    return code


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_those_of_the_page(page):
    tools = {line.rpartition(" | ")[2].split()[2] for line in commands(page)}
    wanted = {"docs/judge.md": 6, "docs/export.md": 3}
    assert len(tools) == wanted[page]
    assert all((ROOT / tool.replace(".", "/")).with_suffix(".py").is_file() for tool in tools)


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_pages_works(place, page):
    with contextlib.chdir(place):
        assert run("python -m tools.export output/pets/best.pth --output deploy") == 0
        for block in blocks(page, "python"):
            names = {"picture": Image.new("RGB", (20, 20))}
            exec(block, names)
            assert names.get("heat", names.get("logits")).shape in ((16, 16), (1, 2))


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands_of_the_pages_work(place, line):
    with contextlib.chdir(place):
        before = set(os.listdir())
        assert run(line) == 0
        written = re.findall(r"(?:--output|--gradients|>) (\S+)", line)
        assert all(Path(name).exists() for name in written)
        assert set(os.listdir()) - before <= {Path(name).parts[0] for name in written}
