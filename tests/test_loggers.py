"""loggers.py: log.txt, curves.png, per_class.csv, and the progress bar on a terminal."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Terminal, arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loggers import RunLogger, draw_curves, duration, read_log, write_per_class
from optimization.counts import Evaluation


def record(epoch: int, **changes: float) -> dict:
    values = {"epoch": epoch + 1, "train_lr": 0.1 / (1 + epoch), "train_loss": 2.0 - 0.1 * epoch}
    values |= {"test_loss": 1.9 - 0.1 * epoch, "test_acc1": 30.0 + epoch, "n_parameters": 10}
    return values | {"update": 6 * (epoch + 1), "epoch_seconds": 61.0} | changes


def write_epochs(folder: Path, epochs: range, **start: int) -> None:
    logger = RunLogger(folder, tensorboard=False, **start)
    for epoch in epochs:
        logger.epoch(record(epoch), epochs=9, best=False)
    logger.close()


def epochs_in(folder: Path) -> list[int]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


# --- log.txt ------------------------------------------------------------------------------------


def test_log_has_one_line_per_epoch(tmp_path):
    write_epochs(tmp_path, range(3))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(epoch) for epoch in range(3)]


def test_log_is_cut_back_to_the_epoch_of_the_resume(tmp_path):
    write_epochs(tmp_path, range(5))
    RunLogger(tmp_path, tensorboard=False, epoch=2, update=12).close()
    assert epochs_in(tmp_path) == [1, 2]
    write_epochs(tmp_path, range(2, 4), epoch=2, update=12)
    assert epochs_in(tmp_path) == [1, 2, 3, 4]


def test_a_run_that_starts_anew_empties_the_log(tmp_path):
    write_epochs(tmp_path, range(2))
    write_epochs(tmp_path, range(1))
    assert epochs_in(tmp_path) == [1]


def test_a_line_that_a_crash_cut_off_is_left_out_and_said(tmp_path, caplog):
    write_epochs(tmp_path, range(3))
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-20])
    assert [r["epoch"] for r in read_log(path)] == [1, 2]
    assert str(path) in caplog.text
    # The run goes on on a line of its own.
    write_epochs(tmp_path, range(2, 4), epoch=2, update=12)
    assert epochs_in(tmp_path) == [1, 2, 3, 4]


def test_no_log_has_no_epochs(tmp_path):
    assert read_log(tmp_path / "log.txt") == []


def test_what_is_not_finite_becomes_null(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    odd = {"test_loss": math.nan, "train_loss": math.inf, "ema_loss": -math.inf}
    logger.epoch(record(0, **odd), epochs=2, best=False)
    logger.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = (tmp_path / "log.txt").read_text()
    found = json.loads(line, parse_constant=refuse)  # JSON knows no NaN
    assert {name: found[name] for name in odd} == dict.fromkeys(odd)
    assert found["test_acc1"] == 30.0
    # Such a log can be read, drawn and gone on with.
    write_epochs(tmp_path, range(1, 2), epoch=1, update=6)
    assert epochs_in(tmp_path) == [1, 2]


def test_a_logger_of_another_process_is_silent(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    logger = RunLogger(None)
    logger.start_epoch(0, 3, 6)
    logger.advance(3)
    logger.epoch(record(0), epochs=3, best=True)
    logger.close()
    assert not list(tmp_path.iterdir()) and not caplog.text


def test_the_summary_names_the_score_that_decides_and_leaves_out_what_was_not_measured(
    tmp_path, caplog
):
    caplog.set_level("INFO")
    logger = RunLogger(tmp_path, tensorboard=False, metric="test_macro_f1")
    logger.epoch(record(0, test_macro_f1=12.345), epochs=2, best=True)
    measured = {k: v for k, v in record(1).items() if not k.startswith("test_")}
    logger.epoch(measured, epochs=2, best=False)
    assert caplog.messages == [
        "epoch 1/2  train loss 2.0000  test loss 1.9000  top-1 30.00 %  test_macro_f1 12.35 %  "
        "61 s  * best",
        "epoch 2/2  train loss 1.9000  61 s",
    ]
    assert [r["epoch"] for r in read_log(tmp_path / "log.txt")] == [1, 2]


def test_the_summary_of_an_epoch(tmp_path, caplog):
    """The first epoch, every second one and the last; the first says how long all will take."""
    caplog.set_level("INFO")
    logger = RunLogger(tmp_path, tensorboard=False, print_epoch=2)
    for epoch in range(5):
        more = {"test_acc5": 80.0, "ema_acc1": 40.0}
        logger.epoch(record(epoch, **more), epochs=5, best=epoch == 4, to_go=(4 - epoch) * 61.0)
    first, *others = caplog.messages
    assert first == (
        "epoch 1/5  train loss 2.0000  test loss 1.9000  top-1 30.00 %  top-5 80.00 %  "
        "EMA top-1 40.00 %  61 s  (about 4 min 04 s to go)"
    )
    assert [m.partition("  ")[0] for m in others] == ["epoch 2/5", "epoch 4/5", "epoch 5/5"]
    assert [m.endswith("  * best") for m in others] == [False, False, True]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.9, "0 s"),
        (89, "89 s"),
        (90, "1 min 30 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (2 * 3600 + 300, "2 h 05 min"),
        (86399, "23 h 59 min"),
        (86400 + 7200, "1 d 02 h"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


# --- curves.png ---------------------------------------------------------------------------------


def test_curves_are_an_image_of_a_sane_size(tmp_path):
    records = [record(epoch, ema_loss=1.5, ema_acc1=35.0) for epoch in range(3)]
    draw_curves(records, tmp_path / "curves.png")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        width, height = image.size
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert 800 <= width <= 2000 and 250 <= height <= 800
    # Loss, accuracy, rate: the average's orange curves are in the first two panels.
    orange = (pixels[..., 0] - pixels[..., 2] > 100).sum(0)
    panels = [int(part.sum()) for part in np.array_split(orange, 3)]
    assert panels[0] > 50 and panels[1] > 50 and panels[2] == 0


def test_curves_join_the_epochs_with_a_validation(tmp_path):
    """Of 80 epochs every fourth is measured; without gaps between them, which lines would need."""
    flat = {"test_loss": 1.0, "test_acc1": 50.0, "train_loss": 2.0}
    whole = [record(epoch, **flat) for epoch in range(80)]
    some = [
        r if i % 4 == 3 or i == 0 else {k: v for k, v in r.items() if not k.startswith("test_")}
        for i, r in enumerate(whole)
    ]

    def blue(records) -> int:
        draw_curves(records, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        return int((pixels[..., 2] - pixels[..., 0] > 100).sum())

    assert blue(some) >= 0.8 * blue(whole) > 100


def test_curves_follow_the_records(tmp_path):
    """Another run looks different; what is missing or null leaves a gap, and is no error."""
    draw_curves([record(0), record(1)], tmp_path / "a.png")
    draw_curves([record(0), record(1, test_loss=9.0)], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    draw_curves([record(0, test_loss=None), record(1, test_loss=None)], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size == Image.open(tmp_path / "a.png").size


# --- per_class.csv ------------------------------------------------------------------------------


def test_per_class_table(tmp_path):
    correct, count = torch.tensor([2, 0, 0]), torch.tensor([3, 2, 0])
    result = Evaluation(1.0, 40.0, None, 5, correct, count, count)
    names = ["amber", 'blue, "navy"', "crimson"]
    write_per_class(tmp_path / "per_class.csv", names, result)
    assert (tmp_path / "per_class.csv").read_text(encoding="utf-8").splitlines() == [
        "class,images,correct,accuracy",
        "amber,3,2,66.67",
        '"blue, ""navy""",2,0,0.00',
        "crimson,0,0,",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["per_class.csv"]


def test_a_class_name_that_is_not_utf8(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    result = Evaluation(1.0, 40.0, None, 5, *torch.tensor([[2], [3], [5]]))
    write_per_class(tmp_path / "per_class.csv", [name], result)
    assert r"caf\xe9,3,2,66.67" in (tmp_path / "per_class.csv").read_text(encoding="utf-8")


# --- TensorBoard --------------------------------------------------------------------------------


def test_histograms_that_cannot_be_drawn_are_left_out_and_said_once(tmp_path, caplog):
    """TensorBoard raises for what is empty or lies beyond its last bin, 1e20."""
    values = {"fine": [1.0], "empty": [], "nan": [math.nan], "inf": [1.0, math.inf], "far": [1e30]}
    model = torch.nn.Module()
    for name, value in values.items():
        setattr(model, name, torch.nn.Parameter(torch.tensor(value)))
    model.fine.grad = torch.tensor([math.nan])
    logger = RunLogger(tmp_path)
    for update in (1, 2):
        logger.histograms(model, update)
    model.nan.data.zero_()
    logger.histograms(model, 3)
    logger.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    found.Reload()
    steps = {tag: [e.step for e in found.Histograms(tag)] for tag in found.Tags()["histograms"]}
    assert steps == {"weights/fine": [1, 2, 3], "weights/nan": [3]}
    assert caplog.text.count("no histograms of 5 tensors") == 1 and "weights/far" in caplog.text


# --- the progress bar ---------------------------------------------------------------------------


def on_screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end: what follows a carriage return covers them."""
    lines = []
    for written in text.split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


def test_a_bar_is_drawn_on_a_terminal_and_gone_in_the_end(images, tmp_path):
    argv = arguments(images, tmp_path, "--epochs", "1", "--warmup-epochs", "0")
    terminal = Terminal(argv)
    assert terminal.wait() == 0, terminal.text
    assert "\r" in terminal.text
    for title in ("epoch 1/1:", "evaluate:", "evaluate EMA:"):
        assert title in terminal.text
    assert "/6 [" in terminal.text  # six batches
    # Log steps are shown in the bar, not as lines of their own.
    assert "loss " in terminal.text and "epoch 1 [" not in terminal.text
    left = on_screen(terminal.text)
    assert len([line for line in left if line.startswith("epoch 1/1  train loss")]) == 1
    assert not any("batch/s" in line for line in left), left


def test_sixteen_bit_greys_are_stretched_on_the_sheet():
    grids = []
    logger = RunLogger(None)
    logger.writer = types.SimpleNamespace(add_image=lambda tag, grid, step: grids.append(grid))
    dark = torch.linspace(0, 0.01, 64).view(1, 1, 8, 8)
    for depth in (16, 8):
        logger.images(dark, (0.0,), (1.0,), depth)
    low, high = torch.quantile(dark, 0.02), torch.quantile(dark, 0.98)
    wanted = ((dark[0] - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(grids[0], wanted.expand(3, 8, 8), atol=1 / 255, rtol=0)
    torch.testing.assert_close(grids[1], dark[0].expand(3, 8, 8))
