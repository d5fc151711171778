"""tools.bench: figures come from both sides, and BENCHMARKS.md shows what they say."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import models
from errors import UserError
from tools.bench import __main__ as bench
from tools.bench import card, common, limits, variants
from tools.bench.card_summary import TARGETS, Done, red_tests, write_summary
from tools.bench.figures import limit_text, read_figures
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
    assert common.alone("x", workload(99, 1, 2, 3), repeats=3)["ours"] == 6


def arguments(*argv):
    parser = common.bench_parser("cut", "")
    common.add_repeats(parser)
    return parser, parser.parse_args([*map(str, argv), "--device", "cpu"])


def row(title, ours=2.0, **more):
    return {"title": title, **common.summary([ours], [1.0]), **more}


def test_figures_are_written_after_each_row(tmp_path):
    """A benchmark that is cut short keeps what it has measured, and the command to go on with."""
    parser = common.bench_parser("cut", "")
    common.add_repeats(parser)
    argv = ["--repeats", "2", "--device", "cpu", "--out", str(tmp_path), "--seconds-left", "60"]

    def rows(arguments, device):
        yield row("a")
        raise KeyboardInterrupt

    assert common.run("cut", rows, parser, argv) == 130
    (written,) = read_figures(tmp_path / "cut-cpu.json")
    assert row("a").items() <= written.items()
    assert written["command"] == "python -m tools.bench cut --device cpu --repeats 2"
    around = written["surroundings"]
    assert {"hardware", "cores", "torch", "timm", "torchvision"} <= around.keys()


def test_rows_are_replaced_by_title_and_command(tmp_path):
    def measured(rows, *argv):
        common.record("x", *arguments("--out", tmp_path, *argv), rows)
        return [(r["title"], r["ours"]) for r in read_figures(tmp_path / "x-cpu.json")]

    assert measured([row("a"), row("b")]) == [("a", 2.0), ("b", 2.0)]
    # Another command adds its row; the first one replaces its own, and forgets an old title.
    assert measured([row("c")], "--repeats", 3) == [("a", 2.0), ("b", 2.0), ("c", 2.0)]
    assert measured([row("a", 5.0)]) == [("a", 5.0), ("c", 2.0)]


def test_a_row_that_would_come_too_late_is_not_begun(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    parser, _ = arguments()

    def rows(arguments, device):
        for name, seconds in (("a", 10), ("b", 15), ("c", 1)):
            now[0] += seconds
            yield row(name)

    argv = ["--out", str(tmp_path), "--seconds-left", "39", "--device", "cpu"]
    assert common.run("x", rows, parser, argv) == 2  # 25 s are gone, and a row may take 15 s
    assert [r["title"] for r in read_figures(tmp_path / "x-cpu.json")] == ["a", "b"]
    assert "out of time after 25 s" in capsys.readouterr().err


def test_a_part_that_fails_does_not_stop_the_others(capsys):
    def broken():
        yield row("half")
        raise ValueError("why\nmore")

    parts = [("first", broken), ("second", lambda: iter([row("whole")]))]
    found = []
    with pytest.raises(UserError, match="not measured: first"):
        for one in common.surviving(parts):
            found.append(one["title"])
    assert found == ["half", "whole"]
    assert "first: ValueError: why" in capsys.readouterr().out


def test_limits_are_shown_with_what_is_reached(tmp_path):
    bound = common.limit("decoding alone", 8.0)
    assert limit_text(row("a", limit=bound)) == "decoding alone: 8.0 images/s (25%)"
    other = common.limit("products", 812.3, "TFLOP/s", share=0.4)
    assert limit_text(row("a", limit=other)) == "products: 812 TFLOP/s (40%)"
    assert limit_text(row("a")) == "not measured"
    with pytest.raises(ValueError, match="needs a share"):
        common.limit("products", 812.3, "TFLOP/s")
    # A row of 1e9 multiply-accumulates does 6e9 operations a step and image.
    assert limits.matmul_limit(torch.bfloat16, 12e12, 10**9, 500.0)["share"] == 0.25
    rows = [row("one", limit=bound, note="12 s"), {"title": "two", "ours": 3.0, "repeats": 1}]
    common.record("step", *arguments("--out", tmp_path), rows)
    page = report(tmp_path)
    assert (
        "| one; 12 s | 2 | 1 | 2.00× | 1, 2.00 to 2.00 | decoding alone: 8.0 images/s (25%) | 1 |"
        in page
    )
    assert "| two | 3 |  |  | 1 | not measured | 1 |" in page
    assert "1. `python -m tools.bench step --device cpu`, 20" in page
    assert "step on CUDA" in page


def test_photographs(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(load_sample_images().images):
        Image.fromarray(image).resize((400, 300)).save(images / f"{i}.jpg")
    argv = ["loader", "--repeats", "1", "--images", str(images), "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    rows = read_figures(tmp_path / "loader-cpu.json")
    assert len(rows) == 3 and all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


def test_scan(tmp_path):
    argv = ["scan", "--repeats", "1", "--images", "300", "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    rows = read_figures(tmp_path / "scan-cpu.json")
    assert [row["title"].rpartition("against ")[2] for row in rows] == [
        "torchvision's ImageFolder",
        "timm's create_dataset",
    ]
    assert all(row["title"].startswith("300 files in 3 folders") for row in rows)
    assert all(row["limit"]["value"] > 0 and row["ours"] > 0 < row["theirs"] for row in rows)


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


# --- variants of a step ---------------------------------------------------------------------------


def test_patches_as_a_product_of_matrices_are_the_convolution():
    model = models.build_model("deit_nano_patch4_32", 10, input_size=16).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = model(images)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    names = list(model.state_dict())
    model.zero_grad()
    variants.patches_as_linear(model)
    assert type(model.patch_embed.proj) is variants.PatchLinear
    answer = model(images)
    answer.square().sum().backward()
    torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)
    assert list(model.state_dict()) == names
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-11)


def test_the_sums_along_the_blocks_are_of_autocasts_type():
    """With weights of the same names; nothing changes without autocast."""
    model = models.build_model("deit_nano_patch4_32", 10, input_size=16).eval()
    images = torch.randn(3, 3, 16, 16)
    expected, names, kinds = model(images), list(model.state_dict()), []
    variants.residual_in_autocast_type(model)
    assert torch.equal(model(images), expected) and list(model.state_dict()) == names
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(images)
    assert set(kinds) == {torch.bfloat16}
    torch.testing.assert_close(answer.float(), expected, rtol=0.05, atol=0.05)


def test_a_variant_is_compiled_for_itself():
    """Two models of a class share what torch has compiled for its ``forward``, copies don't."""
    one, two = (models.build_model("deit_nano_patch4_32", 10, input_size=16) for _ in range(2))
    variants.with_own_code(two)
    assert type(one).forward.__code__ is not type(two).forward.__code__
    assert isinstance(two, type(one))
    two.load_state_dict(one.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(one.eval()(images), two.eval()(images))


# --- all of it on a card --------------------------------------------------------------------------


def test_red_tests_are_found_in_whole_and_in_cut_output():
    text = """
[gw0] [ 10%] PASSED tests/test_cuda.py::test_run[--amp bf16]
[gw1] [ 12%] FAILED tests/test_cuda.py::test_run[--opt lamb --accum-steps 2]
[gw1] [ 15%] ERROR tests/test_engine.py::test_x
=========================== short test summary info ============================
FAILED tests/test_cuda.py::test_run[--opt lamb --accum-steps 2] - assert 1 == 2
"""
    found = [
        "tests/test_cuda.py::test_run[--opt lamb --accum-steps 2]",
        "tests/test_engine.py::test_x",
    ]
    assert red_tests(text) == found


def part(name, code, limit=60.0):
    return card.Part(name, limit, ("-c", code), told=False)


def test_parts_that_fail_or_hang_do_not_stop_the_next(tmp_path, monkeypatch, capfd):
    """One fails, one hangs and is asked to end, one ignores that: each is in the summary."""
    monkeypatch.setattr(card, "GRACE", 0.5)
    monkeypatch.setattr(card, "LEAST", 0.1)
    runner = card.Runner(tmp_path, 60, dry=False)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"
    polite = """
import time
try:
    print("begun", flush=True)
    time.sleep(99)
except KeyboardInterrupt:
    print("kept what was measured", flush=True)
    raise SystemExit(130)
"""
    runner.run([part("fails", "raise SystemExit(3)"), part("deaf", deaf, 0.5)])
    runner.run([part("hangs", polite, 1.5)])
    runner.run([part("works", "print('done')")])
    codes = {done.name: done.code for done in runner.done}
    assert codes == {"fails": 3, "deaf": -9, "hangs": 130, "works": 0}
    assert "kept what was measured" in runner.log("hangs").read_text()
    runner.end = runner.start
    runner.run([part("late", "print('never')")])
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [p["code"] for p in parts if p["name"] == "late"] == [None]
    assert "hangs: exit 130 after" in (tmp_path / "summary.txt").read_text()
    assert "== works: exit 0" in capfd.readouterr().out


def test_figures_are_held_against_the_targets(tmp_path):
    def write(benchmark, *rows, argv=()):
        common.record(benchmark, *arguments("--out", tmp_path, *argv), rows)

    product = common.limit("products", 800.0, "TFLOP/s", share=0.38)
    title = "deit_small_patch16_224, batch 256, compiled bf16, against timm's model"
    write("step", row(title, 10_500.0, limit=product))
    write("epoch", {"title": "the whole quickstart", "ours": 9.0, "repeats": 1, "seconds": 31.0})
    toy = {"title": "cait_S24_224", "ours": 9.0, "ratio": 3.0, "repeats": 1}
    write("attention", toy, argv=("--toy",))
    (tmp_path / "logs").mkdir()
    write_summary(tmp_path, [Done("step", 0, 3.0)])
    found = json.loads((tmp_path / "summary.json").read_text())["targets"]
    reached = {target["what"]: target["reached"] for target in found}
    assert len(reached) == len(TARGETS)
    assert reached["DeiT-S"] is True
    assert reached["DeiT-S of the matmul rate"] is False
    assert reached["the quickstart"] is False
    assert reached["CaiT-S24 against timm's"] is None  # a toy's figures mean nothing
    assert "the quickstart: 31 (≤ 30 s), MISSED" in (tmp_path / "summary.txt").read_text()


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of `.ci/gpu --dry`, in this process, which has imported all; without the parts
    that only fill the compiler's cache, or start services and processes."""
    folder = tmp_path_factory.mktemp("dry")
    parts = ["tests-runs", "step", "attention", "epoch", "cache"]
    assert bench.main(["card", str(folder), "--dry", "--parts", *parts]) == 0, logs(folder)
    return folder


def logs(folder):
    return "\n".join(path.read_text() for path in (folder / "logs").glob("*.txt"))


def test_a_dry_run_goes_through_all_parts(dry):
    parts = json.loads((dry / "summary.json").read_text())["parts"]
    assert {p["name"] for p in parts} >= {"tests-runs", "step", "attention", "epoch", "cache"}
    assert all(p["code"] == 0 for p in parts)
    assert "test_cuda.py" in (dry / "logs/tests-runs.txt").read_text()


@pytest.mark.parametrize("name, count", [("step", 2), ("attention", 1), ("epoch", 2)])
def test_rows_of_a_dry_run_are_whole(dry, name, count):
    rows = read_figures(dry / f"{name}-cpu.json")
    assert len(rows) == count
    page = report(dry)
    for one in rows:
        assert one["ours"] > 0 and "--toy" in one["command"]
        assert limit_text(one) != "not measured"
        assert f"| {one['title']}" in page


def test_small_images(dry):
    rows = read_figures(dry / "cache-cpu.json")
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    # Far below what is measured on a quiet machine, so that a busy one doesn't matter.
    assert all(row["ratio"] > 1.5 for row in rows[:2])


def test_memory_of_cait(dry):
    (one,) = read_figures(dry / "attention-cpu.json")
    assert 0 < one["share_of_memory"] < 1


def test_the_script_starts_from_anywhere(tmp_path):
    script = common.ROOT / ".ci/gpu"
    listed = subprocess.run(
        [str(script), "--list"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = listed.stdout.splitlines()
    assert any(line.startswith("tests-runs (150 s): python -m pytest") for line in lines)
    assert any(" -m tools.bench step --repeats 5 " in line for line in lines)
