"""docs/notebooks.md and examples/notebook.ipynb, run by a real kernel."""

import contextlib
import shutil
import sys

import nbformat
import pages
import pytest
from nbclient import NotebookClient
from tiny_images import image_folder

from loggers import read_log

NOTEBOOK = pages.ROOT / "examples" / "notebook.ipynb"
SMALL = {"epochs": 1, "num_workers": 1}


def notebook(**parameters) -> nbformat.NotebookNode:
    """The notebook with other parameters."""
    found = nbformat.read(NOTEBOOK, as_version=4)
    [cell] = [c for c in found.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return found


def code_cells(found: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [c for c in found.cells if c.cell_type == "code"]


def executed(folder, **parameters) -> list[str]:
    """What the cells of the notebook print in ``folder``, run by a kernel."""
    found = notebook(**parameters)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(found, timeout=300, kernel_name="python3", resources=place).execute()
    said = []
    for cell in code_cells(found):
        texts = [o.get("text") or o["data"].get("text/plain", "") for o in cell.outputs]
        kinds = [kind for o in cell.outputs for kind in o.get("data", {})]
        said.append("\n".join([*texts, *kinds]))
    return said


def test_the_notebook_trains_and_goes_on_in_another_session(tmp_path, monkeypatch, capsys):
    """The first session is out of time; its folder is an input of the second, as on Kaggle.

    The first is run in this process, which spares it the seconds of a kernel's imports.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    common = {"CODE": str(pages.ROOT), "OPTIONS": SMALL}
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    scope = {}
    with contextlib.chdir(first):
        for cell in code_cells(notebook(HOURS=1e-6, **common)):
            exec(cell.source, scope)
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "not at its end" in said and read_log(first / "run/log.txt") == []
    shutil.move(first / "run", tmp_path / "earlier")
    said = executed(second, EARLIER=str(tmp_path / "earlier"), **common)
    assert "resumed run/checkpoint-" in said[3] and "at its end" in said[4]
    assert "not at its end" not in said[4]
    assert "image/png" in said[4] and "test_acc1" in said[4]
    assert "knows 10 classes" in said[5]
    assert [record["epoch"] for record in read_log(second / "run/log.txt")] == [1]


def test_the_script(tmp_path, monkeypatch, capsys):
    image_folder(tmp_path / "pets", {"train": 4, "val": 2}, classes=("cat", "dog"))
    monkeypatch.chdir(tmp_path)
    script = pages.blocks("docs/notebooks.md", "python")[0]
    options = {"epochs=10": "epochs=1, batch_size=2, num_workers=0, input_size=16"}
    options["deit_small"] = "deit_nano_patch4_32"
    for old, new in options.items():
        assert old in script
        script = script.replace(old, new)
    scope = {}
    exec(script, scope)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("best.pth") and float(last.split()[0]) == pytest.approx(
        scope["result"].metrics["test_acc1"]
    )
