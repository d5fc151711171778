"""tools.bench: figures come from both sides, and BENCHMARKS.md shows what they say."""

import json

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tools.bench import __main__ as bench
from tools.bench import common
from tools.bench.report import report


def test_page_is_what_the_figures_say():
    page = (common.ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert page == report()


def test_medians_and_ratios(monkeypatch):
    """A side's rate is images over time; the ratio is that of each turn."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    def workload(*seconds):
        durations = iter(seconds)

        def run():
            now[0] += next(durations)
            return 12

        return run

    row = common.compare("x", workload(99, 1, 2, 3), workload(99, 2, 2, 12), repeats=3)
    assert row["ours"] == 6 and row["theirs"] == 6
    assert (row["ratio"], row["least"], row["most"]) == (2.0, 1.0, 4.0)


def test_figures_are_written_after_each_row(tmp_path):
    """A benchmark that is cut short keeps what it has measured, and the command to go on with."""
    parser = common.bench_parser("cut", "")
    common.add_repeats(parser)
    argv = ["--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]
    row = {"title": "a", **common.summary([2.0], [1.0])}

    def rows(arguments, device):
        yield row
        raise KeyboardInterrupt

    assert common.run("cut", rows, parser, argv) == 130
    content = json.loads((tmp_path / "cut-cpu.json").read_text())
    assert content["rows"] == [row]
    assert content["command"] == "python -m tools.bench cut --device cpu --repeats 2"


def test_small_images(tmp_path):
    argv = ["cache", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    content = json.loads((tmp_path / "cache-cpu.json").read_text())
    assert {"hardware", "cores", "torch", "timm", "torchvision"} <= content["surroundings"].keys()
    # Far below what is measured on a quiet machine, so that a busy one doesn't matter.
    assert all(row["ratio"] > 1.5 for row in content["rows"])
    page = report(tmp_path)
    assert all(f"| {row['title']} |" in page for row in content["rows"])
    assert "cache on CUDA" in page and "step on CUDA" in page


def test_photographs(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(load_sample_images().images):
        Image.fromarray(image).resize((400, 300)).save(images / f"{i}.jpg")
    argv = ["loader", "--repeats", "1", "--images", str(images), "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    rows = json.loads((tmp_path / "loader-cpu.json").read_text())["rows"]
    assert len(rows) == 3 and all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


def test_attention_adds_to_the_figures(tmp_path):
    argv = ["attention", "--model", "cait_xxs24_224", "--steps", "1", "--batch-size", "1"]
    argv += ["--device", "cpu", "--out", str(tmp_path)]
    for number in (1, 2):
        assert bench.main(argv) == 0
        results = json.loads((tmp_path / "attention-cpu.json").read_text())
        assert len(results) == number and results[-1]["batch_size"] == 1
    assert 0 < results[0]["share_of_timms_memory"] < 1
    assert "cait_XXS24_224" in report(tmp_path)


@pytest.mark.parametrize(
    "argv, code, words",
    (
        (["--help"], 0, "a training step of CaiT"),
        ([], 2, "usage: python -m tools.bench COMMAND"),
        (["stepp"], 2, "unknown command 'stepp'; did you mean step?"),
        (["loader", "--images", "."], 2, "has no JPEG files"),
    ),
)
def test_commands_and_errors(argv, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench.main(argv) == code
    captured = capsys.readouterr()
    assert words in (captured.err if code else captured.out)
