"""Every command that prints, draws or writes names: with names of files and classes that mean harm.

A name may hold commands for terminals, line ends, formulas of LaTeX and of spreadsheets, HTML and
Markdown.
"""

import csv
import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import main
from checkpointing.files import load_checkpoint
from outputs.names import from_csv_cell
from tools import average, diagnose, doctor, explain, export, inspect, predict, report
from tools.data.__main__ import main as data

CLASSES = sorted(
    (
        "=cmd|' !A0",
        "@SUM(1+9)",
        r"$\frac{$",
        "\x1b]0;owned\x07\x1b[31mred\x9b2J",
        "two\nforged line",
        "\u202egnp\u2066\u200b\u2028.exe",
        "<img src=x onerror=alert(1)>",
        "\"quotes'`{}&amp;`",
        "x" * 250,
        "--- [a](http:evil) **b**",
        "\U0001f469\u200d\U0001f680 火",
    )
)
MODEL = ["--model", "deit_nano_patch4_32", "--input-size", "8", "--device", "cpu"]
MODEL += ["--num-workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two images of each class for training, one for validation; two can't be read."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                color = (number * 20, i * 90, 128)
                Image.new("RGB", (8, 8), color).save(folder / f"={i}\x1b[2J\nforged line$_$.png")
    (folder / "-damaged\x1b[2J\nforged line.png").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory) -> Path:
    """A run on them, whose own folder has such a name."""
    root = tmp_path_factory.mktemp("run") / "run\x1b[2J\nforged line"
    argv = [*MODEL, "--data-path", str(images), "--output-dir", str(root), "--epochs", "3"]
    argv += ["--batch-size", "11", "--warmup-epochs", "0", "--on-bad-image", "skip"]
    assert main.main(argv) == 0
    return root


def assert_plain(text: str) -> None:
    """No line commands a terminal, or was begun by a name."""
    lines = text.split("\n")
    assert [line for line in lines if not line.replace("\u200d", "").isprintable()] == []
    assert [line for line in lines if line.startswith("forged")] == []


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))
    formulas = [c for r in found for c in r if c.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert formulas == []
    return found


class Tags(HTMLParser):
    """The names and attributes of a page's elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: set[str] = set()
        text = path.read_text(encoding="utf-8")
        assert re.sub(r"[\n\u200d]", "", text).isprintable()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag}.{name}" for name, _ in attributes)}


def assert_page(path: Path) -> None:
    assert not Tags(path).found & {"script", "img.onerror", "a"}


def test_training_says_names_plainly(images, tmp_path, capsys):
    argv = [*MODEL, "--data-path", str(images), "--output-dir", str(tmp_path / "\x1b[2J\nforged")]
    argv += ["--epochs", "1", "--batch-size", "11", "--warmup-epochs", "0"]
    assert main.main([*argv, "--on-bad-image", "skip"]) == 0
    assert main.main([*argv, "--on-bad-image", "raise", "--val-fraction", "0.5"]) == 2
    captured = capsys.readouterr()
    assert "two\\nforged line" in captured.out
    assert_plain(captured.out + captured.err)


def test_evaluation(images, folder, tmp_path, capsys):
    argv = ["--eval", "--resume", str(folder / "best.pth"), "--device", "cpu", "--num-workers", "0"]
    assert main.main(argv) == 0
    table = rows(folder / "eval_model_per_class.csv")
    assert [from_csv_cell(row[0]) for row in table[1:]] == CLASSES
    assert main.main([*argv, "--data-path", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)


@pytest.mark.parametrize("form", predict.WRITERS)
def test_predict(images, folder, tmp_path, capsys, form):
    argv = [str(folder / "best.pth"), str(images), "--device", "cpu", "--format", form]
    assert predict.main([*argv, "--topk", "20"]) == 4
    captured = capsys.readouterr()
    assert_plain(captured.err)
    if form == "csv":
        # A file has the names as they are.
        with open(tmp_path / "x.csv", "w", newline="") as file:
            answer = predict.Prediction("=1.png", CLASSES, [0.1] * len(CLASSES))
            predict.write_csv([answer], file)
        found = rows(tmp_path / "x.csv")
        assert {row[0] for row in found[1:]} == {"./=1.png"}
        assert [from_csv_cell(row[2]) for row in found[1:]] == CLASSES
    else:
        assert_plain(captured.out)
    if form == "json":
        answers = json.loads(captured.out)
        assert {p["class"] for a in answers for p in a["predictions"]} == set(CLASSES)


def test_inspect(folder, tmp_path, capsys):
    model = load_checkpoint(folder / "best.pth")
    assert inspect.main([str(folder / "best.pth"), "--layers"]) == 0
    chart = ["--gradients", str(tmp_path / "flow.png"), "--device", "cpu", "--num-workers", "0"]
    assert inspect.main([str(folder / "best.pth"), *chart]) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    assert inspect.main([str(folder / "best.pth"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == model["class_names"] == CLASSES


def test_report(folder, tmp_path, capsys):
    argv = [str(folder / "best.pth"), "--device", "cpu", "--num-workers", "0"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        assert report.main([*argv, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    assert_page(tmp_path / "report.html")
    table = rows(tmp_path / "confusion.csv")
    assert [from_csv_cell(cell) for cell in table[0][1:]] == CLASSES
    per_class = json.loads((tmp_path / "report.json").read_text())["per_class"]
    assert [row["class"] for row in per_class] == CLASSES
    assert Image.open(tmp_path / "confusion.png").width > 300


def test_explore(images, tmp_path, capsys):
    argv = ["explore", "--data-path", str(images), "--output-dir", str(tmp_path)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        assert data(argv) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    assert_page(tmp_path / "report.html")


def test_explain(images, folder, tmp_path, capsys):
    argv = [str(folder / "best.pth"), str(images / "val"), "--device", "cpu"]
    assert explain.main([*argv, "--output", str(tmp_path / "out")]) in (0, 4)
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    assert_page(tmp_path / "out" / "explain.html")


def test_diagnose_average_and_doctor(images, folder, tmp_path, capsys):
    assert diagnose.main([str(folder)]) == 0
    copies = [tmp_path / f"{name}\x1b[2J\nforged.pth" for name in "ab"]
    for path in copies:
        os.link(folder / "best.pth", path)
    output = ["--output", str(tmp_path / "mean.pth")]
    assert average.main([*map(str, copies), *output]) == 0
    assert average.main([str(tmp_path / "absent\x1b[2J\nforged.pth"), *output]) == 2
    assert doctor.main([*MODEL, "--data-path", str(images), "--batch-size", "11"]) in (0, 2)
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)


def test_a_split_is_read_back_as_it_was(images, tmp_path, capsys):
    parts = tmp_path / "parts"
    assert data(["split", str(images / "train"), "--output-dir", str(parts), "--val", "0.5"]) == 0
    table = rows(parts / "train.csv")
    assert sorted(from_csv_cell(row[1]) for row in table[1:]) == CLASSES
    argv = [*MODEL, "--data-set", "CSV", "--data-path", str(parts), "--epochs", "1"]
    argv += ["--batch-size", "11", "--warmup-epochs", "0", "--output-dir", str(tmp_path / "run")]
    assert main.main([*argv, "--on-bad-image", "skip"]) == 0
    assert load_checkpoint(tmp_path / "run" / "best.pth")["class_names"] == CLASSES
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)


def test_a_model_card_is_text(folder, tmp_path, capsys):
    argv = [str(folder / "best.pth"), "--format", "hub", "--output", str(tmp_path)]
    assert export.main(argv) == 0
    captured = capsys.readouterr()
    assert_plain(captured.out + captured.err)
    [card] = tmp_path.rglob("README.md")
    text = card.read_text(encoding="utf-8")
    assert_plain(text)
    outside = re.sub(r"(?ms)^(`{3,}).*?^\1$|`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\((?!curves)", outside)
    assert text.count("\n---\n") == 1
    config = json.loads(next(tmp_path.rglob("config.json")).read_text(encoding="utf-8"))
    assert config["label_names"] == CLASSES
