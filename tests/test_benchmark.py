"""tools.benchmark: that its figures come from both sides, and that the page shows what they say."""

import json

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tools import benchmark


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "benchmarks")
    return tmp_path / "benchmarks"


def test_page_is_what_the_figures_say():
    page = (benchmark.ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert page == benchmark.report()


def test_medians_and_ratios(monkeypatch):
    """A contender's rate is pictures over time; the ratio is that of each turn."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def contender(*seconds):
        durations = iter(seconds)

        def run():
            now[0] += next(durations)
            return 12

        return run

    row = benchmark.compare("x", contender(99, 1, 2, 3), contender(99, 2, 2, 12), repeats=3)
    assert row["ours"] == 6 and row["theirs"] == 6
    assert (row["ratio"], row["least"], row["most"]) == (2.0, 1.0, 4.0)


def test_small_pictures(folder):
    assert benchmark.main(["cache", "--repeats", "1", "--device", "cpu"]) == 0
    content = json.loads((folder / "cache-cpu.json").read_text())
    assert content["command"] == "python -m tools.benchmark cache"
    assert {"hardware", "cores", "torch", "timm", "torchvision"} <= content["surroundings"].keys()
    # Far below what is measured on a quiet machine, so that a busy one doesn't matter.
    assert all(row["ratio"] > 1.5 for row in content["rows"])
    page = benchmark.report(folder)
    assert all(f"| {row['title']} |" in page for row in content["rows"])
    assert "cache on CUDA" in page and "step on CUDA" in page


def test_photographs(folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(load_sample_images().images):
        Image.fromarray(image).resize((400, 300)).save(pictures / f"{i}.jpg")
    argv = ["loader", "--repeats", "1", "--device", "cpu", "--pictures", str(pictures)]
    assert benchmark.main(argv) == 0
    rows = json.loads((folder / "loader-cpu.json").read_text())["rows"]
    assert len(rows) == 3 and all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


def test_a_folder_without_photographs(tmp_path, capsys):
    assert benchmark.main(["loader", "--device", "cpu", "--pictures", str(tmp_path)]) == 2
    assert "has no JPEG files" in capsys.readouterr().err
