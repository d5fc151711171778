"""docs/evaluate.md and docs/export.md: their commands and their Python are run in turn."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from pages import blocks, commands, tool
from PIL import Image

PAGES = ("docs/evaluate.md", "docs/export.md")


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
        code = tool(module)(argv)
    assert out.getvalue()
    if target:
        Path(target).write_text(out.getvalue())
    return code


@pytest.mark.parametrize("page, count", (("docs/evaluate.md", 6), ("docs/export.md", 3)))
def test_the_pages_name_tools_that_exist(page, count):
    tools = {line.rpartition(" | ")[2].split()[2] for line in commands(page)}
    assert len(tools) == count
    assert all(importlib.util.find_spec(tool) for tool in tools)


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_pages_works(after_training, page):
    assert run("python -m tools.export output/pets/best.pth --format onnx hub --output deploy") == 0
    image = Image.new("RGB", (20, 20))
    image.save("cat.jpg")
    for block in blocks(page, "python"):
        names = {"image": image}
        exec(block, names)
        assert names.get("heat", names.get("logits")).shape in ((16, 16), (1, 2))


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands_of_the_pages_work(after_training, line):
    before = set(os.listdir())
    assert run(line) == 0
    written = re.findall(r"(?:--output|--gradients|>) (\S+)", line)
    assert all(Path(name).exists() for name in written)
    assert set(os.listdir()) - before <= {Path(name).parts[0] for name in written}
