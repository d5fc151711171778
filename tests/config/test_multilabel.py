"""config/multilabel.py: what --task multilabel changes and rules out."""

import pytest

from config import COMMAND_LINE, load, unused
from errors import OptionError

TASK = ["--task", "multilabel", "--data-set", "CSV"]


def test_options_that_nobody_set_are_those_of_the_task(tmp_path):
    config = load(TASK)
    assert config.save.best_metric == "test_map" and config.loss.smoothing == 0
    assert config.origin["smoothing"] == "--task"
    assert load([]).save.best_metric == "test_acc1" and load([]).loss.smoothing == 0.1
    config = load([*TASK, "--smoothing", "0.1", "--best-metric", "ema_micro_f1"])
    assert config.loss.smoothing == 0.1 and config.save.best_metric == "ema_micro_f1"
    assert config.origin["smoothing"] == COMMAND_LINE
    # A file of another task spells its defaults out; one of this task means what it says.
    other, same = tmp_path / "other.yaml", tmp_path / "same.yaml"
    other.write_text("smoothing: 0.1\nbest_metric: test_acc1\n")
    same.write_text("task: multilabel\ndata_set: CSV\nsmoothing: 0.1\n")
    config = load([*TASK, "--config", str(other)])
    assert config.loss.smoothing == 0 and config.save.best_metric == "test_map"
    assert load(["--config", str(same)]).loss.smoothing == 0.1
    other.write_text("smoothing: 0.2\n")
    assert load([*TASK, "--config", str(other)]).loss.smoothing == 0.2


@pytest.mark.parametrize(
    "line, message",
    [
        ("--loss ce", "--loss: ce takes classes to exclude each other"),
        ("--loss focal", "--loss: focal takes classes to exclude each other"),
        ("--class-weights balanced", "--class-weights: .* use --pos-weight"),
        ("--sampler balanced --no-repeated-aug", "--sampler: .* --pos-weight balanced weighs rare"),
        ("--pos-weight -1", "--pos-weight: -1 is not above 0"),
        ("--pos-weight nan", "--pos-weight: nan is not above 0"),
        ("--best-metric test_acc1", "--best-metric: 'test_acc1' is not logged; one of test_map"),
        ("--loss asl --cosub", "--cosub: contradicts --loss asl"),
        ("--loss asl --bce-loss", "--bce-loss: contradicts --loss asl"),
        ("--data-set IMNET", "--data-set: IMNET gives each image one class"),
        ("--label-columns a --label-column b", "--label-columns: and --label-column both"),
        ("--label-columns a --label-separator ;", "--label-separator: is for one column"),
        ("--class-map x.txt", "--class-map: is not for --task multilabel"),
    ],
)
def test_what_makes_no_sense_is_refused(line, message):
    with pytest.raises(OptionError, match=message):
        load([*TASK, *line.split()])


def test_options_of_the_task_say_so_elsewhere():
    with pytest.raises(OptionError, match="--loss: asl is for several .* add --task multilabel"):
        load(["--loss", "asl"])
    config = load(["--pos-weight", "2", "--label-separator", ";", "--asl-clip", "0.1"])
    assert unused(config) == [
        "--label-separator has no effect without --task multilabel",
        "--pos-weight has no effect without --task multilabel",
        "--asl-clip has no effect without --loss asl",
    ]
