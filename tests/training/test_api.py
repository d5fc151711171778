"""Training from Python: the run of the command line, more than once in a process."""

import logging
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, assert_same_state, at_update, logged, newest
from runs import train as train_by_command

from errors import OptionError, UserError
from inference import load_for_inference
from loggers import read_log
from training import Result, train


def options(images: Path, folder: Path, **more) -> dict:
    """The options of ``runs.arguments`` as keywords."""
    words, given = arguments(images, folder), {}
    for flag, value in zip(words[::2], words[1::2], strict=False):
        given[flag.removeprefix("--").replace("-", "_")] = value
    return given | {"tensorboard": False} | more


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    """The folder of a run of the command line."""
    folder = tmp_path_factory.mktemp("api") / "whole"
    assert train_by_command(images, folder, "--mixup", "0.2", "--scale", "0.3", "1") == 0
    return folder


def test_it_is_the_run_of_the_command_line_each_time(images, whole, tmp_path):
    """Values may be of NumPy and pathlib, lists stand for several values."""
    handlers = list(logging.getLogger().handlers)
    for name in ("first", "second"):
        given = options(images, tmp_path / name, mixup=np.float64(0.2), scale=[0.3, 1])
        given |= {"data_path": images, "epochs": np.int64(3), "batch_size": 4}
        result = train(**given)
        assert isinstance(result, Result) and result.finished
        assert result.folder == tmp_path / name
        assert logged(result.folder) == logged(whole)
        assert_same_state(newest(result.folder), newest(whole))
        torch.rand(3), random.random()  # the host's own draws change nothing
    assert logging.getLogger().handlers == handlers


def test_what_it_returns(images, tmp_path):
    result = train(**options(images, tmp_path / "run", best_metric="test_loss"))
    assert result.history == read_log(tmp_path / "run" / "log.txt")
    best = min(result.history, key=lambda record: record["test_loss"])
    for key in ("test_acc1", "test_loss", "train_loss"):
        assert result.metrics[key] == best[key]
    assert "epoch" not in result.metrics and result.checkpoint == tmp_path / "run" / "best.pth"
    classifier = load_for_inference(result.checkpoint)
    image = classifier.transform(Image.new("RGB", (8, 8)))[None]
    assert classifier.model(image).shape == (1, len(classifier.class_names))


def test_labels_of_grey_images_by_a_model_of_torchvision(tmp_path):
    rows = ["path,labels"]
    for number, labels in enumerate(("dark", "light|round", "", "round") * 2):
        Image.new("L", (40, 40), 60 * number % 256).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{labels}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(rows))
    more = {"data_set": "CSV", "data_path": table, "val_fraction": 0.5, "task": "multilabel"}
    more |= {"label_separator": "|", "image_root": tmp_path, "in_chans": 1, "input_size": 32}
    more |= {"model": "torchvision/shufflenet_v2_x0_5", "epochs": 1, "warmup_epochs": 0}
    result = train(**options(tmp_path, tmp_path / "run", **more))
    assert 0 <= result.metrics["test_map"] <= 100
    classifier = load_for_inference(result.checkpoint)
    image = classifier.transform(Image.new("L", (50, 40)))[None]
    assert image.shape == (1, 1, 32, 32)
    assert classifier.class_names == ["dark", "light", "round"]
    assert classifier.model(image).shape == (1, 3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"epoch": 3}, "unknown option epoch; did you mean --epochs"),
        ({"epochs": "many"}, "--epochs: .*'many'"),
        ({"epochs": 2.5}, "--epochs: "),
        ({"data_path": "nowhere"}, "nowhere does not exist"),
        ({"eval": True}, "eval: train\\(\\) trains"),
        ({"print_config": True}, "print_config: train"),
        ({"loss": "bce", "bce_loss": True, "smoothing": 0.1}, "--bce-loss"),
        ({"config": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_wrong_options_are_said_as_on_the_command_line(images, tmp_path, more, words):
    with pytest.raises(UserError, match=words) as caught:
        train(**options(images, tmp_path / "run", **more))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pth"))


def test_a_run_that_is_there_is_not_overwritten(whole, images):
    with pytest.raises(OptionError, match="--resume"):
        train(**options(images, whole))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_an_interrupted_run_goes_on(images, whole, tmp_path, number, error):
    given = options(images, tmp_path / "run", mixup=0.2, scale=(0.3, 1), resume="auto")
    with at_update(8, lambda: signal.raise_signal(number)), pytest.raises(error) as caught:
        train(**given)
    assert error is KeyboardInterrupt or caught.value.code == 143
    result = train(**given)
    assert result.finished and logged(result.folder) == logged(whole)
    assert_same_state(newest(result.folder), newest(whole))


def test_a_session_of_limited_time_stops_and_another_goes_on(images, whole, tmp_path, capsys):
    given = options(images, tmp_path / "run", mixup=0.2, scale=(0.3, 1), resume="auto")
    result = train(**given, stop_after=1e-6)
    assert not result.finished and result.history == [] and result.metrics == {}
    said = capsys.readouterr().out
    assert "--stop-after 1e-06; saved" in said and "go on with: python main.py" in said
    assert "stop_after" not in (tmp_path / "run" / "config.yaml").read_text()
    result = train(**given)
    assert result.finished and logged(result.folder) == logged(whole)
    assert_same_state(newest(result.folder), newest(whole))


def test_nothing_left_to_train(whole, images, capsys):
    before = newest(whole)
    result = train(**options(images, whole, mixup=0.2, scale=[0.3, 1], resume="auto"))
    assert result.finished and len(result.history) == 3
    assert "nothing left to train" in capsys.readouterr().out
    assert_same_state(newest(whole), before)


def test_stop_at_epoch_is_not_the_end(images, tmp_path):
    result = train(**options(images, tmp_path / "run", stop_at_epoch=1))
    assert not result.finished and len(result.history) == 1
