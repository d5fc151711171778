"""Names that are not UTF-8, as an old archive leaves them, from training to its tools."""

import csv
import logging
import os
import shutil
from pathlib import Path

import pytest
from runs import newest, train

import main
from checkpointing.files import load_checkpoint
from errors import without_surrogates
from tools import predict
from tools.data import explore

SHORT = ("--epochs", "1", "--warmup-epochs", "0", "--tensorboard")
SHOWN = r"caf\xe9"


class _Valid(logging.Formatter):
    """Another formatter's texts as valid Unicode."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return without_surrogates(self.inner.format(record))


@pytest.fixture(autouse=True)
def _valid_reports():
    """pytest keeps messages as they are, and can't send such names from one process to another."""
    handlers = list(logging.getLogger().handlers)
    before = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.setFormatter(_Valid(handler.formatter or logging.Formatter()))
    yield
    for handler, formatter in zip(handlers, before, strict=True):
        handler.setFormatter(formatter)


@pytest.fixture
def latin(images, tmp_path) -> Path:
    """The images, with a class folder that Latin-1 names, below a folder of the same kind."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es"))
    shutil.copytree(images, root)
    for part in ("train", "val"):
        (root / part / "blue").rename(root / part / os.fsdecode(b"caf\xe9"))
    (root / "val" / os.fsdecode(b"caf\xe9") / "0.png").write_bytes(b"no image")
    return root


def test_a_class_folder_that_is_not_utf8(latin, tmp_path, capsys):
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xfbn"))
    assert train(latin, run, *SHORT, "--on-bad-image", "skip") == 0
    shown = capsys.readouterr().out
    assert shown.count("class folders are not UTF-8") == 1
    assert f"the classes are called {SHOWN}" in shown
    names = load_checkpoint(run / "best.pth")["class_names"]
    assert names == ["amber", SHOWN, "crimson"]
    rows = list(csv.reader((run / "per_class.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in rows] == ["class", *names]
    assert SHOWN in (run / "bad_images.txt").read_text(encoding="utf-8")
    assert main.load_config(["--config", str(run / "config.yaml")]).data.data_path == str(latin)
    more = ("--epochs", "2", "--resume", "auto", "--on-bad-image", "skip")
    assert train(latin, run, *SHORT, *more) == 0
    assert newest(run)["progress"]["epoch"] == 2
    # The model knows the class by the name it is shown with.
    assert main.main(["--eval", "--resume", str(run / "best.pth")]) == 0
    capsys.readouterr()
    assert predict.main(["--device", "cpu", str(run / "best.pth"), str(latin / "val")]) == 4
    assert SHOWN in capsys.readouterr().out
    assert explore.main(["--data-path", str(latin), "--output-dir", str(tmp_path / "rep")]) == 0
    assert SHOWN in (tmp_path / "rep" / "report.html").read_text(encoding="utf-8")
