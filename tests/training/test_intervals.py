"""--val-interval, and what else belongs to the order and the scores of an epoch: whole runs."""

from pathlib import Path

import pytest
from runs import (
    assert_same_state,
    logged,
    newest,
    stopped_after,
    train,
    train_together,
)
from tiny_images import image_folder

import config
from checkpointing.files import load_checkpoint
from training.intervals import epochs_since, is_validated, validations

EVERY_SECOND = ("--val-interval", "2", "--epochs", "3", "--no-model-ema")
# Four images of each of three classes: an epoch of six batches.
UNDERSAMPLED = ("--sampler", "undersample", "--no-repeated-aug", "--batch-size", "2")
OPTIONS = (*EVERY_SECOND, *UNDERSAMPLED, "--best-metric", "macro_f1", "--keep", "9")
# Nothing learns at a rate of zero, so the first validation is the best.
STILL = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0")


def test_which_epochs_are_validated():
    run = config.load(["--val-interval", "3", "--epochs", "8", "--data-path", "x"])
    assert [e for e in range(1, 9) if is_validated(run, e)] == [3, 6, 8]
    assert [epochs_since(run, e) for e in (3, 6, 8)] == [3, 3, 2]
    assert [validations(run, done, 8) for done in range(9)] == [3, 3, 3, 2, 2, 2, 1, 1, 0]
    usual = config.load(["--epochs", "3", "--warmup-epochs", "0", "--data-path", "x"])
    assert [(is_validated(usual, e), epochs_since(usual, e)) for e in (1, 2, 3)] == [(True, 1)] * 3


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """4, 8 and 8 images of three classes; 2 each to validate on."""
    root = image_folder(tmp_path_factory.mktemp("uneven"), {"train": 8, "val": 2})
    for path in sorted((root / "train" / "amber").iterdir())[4:]:
        path.unlink()
    return root


@pytest.fixture(scope="module")
def whole(uneven, tmp_path_factory) -> Path:
    """A run that validates every second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(uneven, folder, *OPTIONS) == 0
    return folder


def test_scores_are_logged_and_compared_where_there_are_some(whole):
    records, progress = logged(whole), newest(whole)["progress"]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert all("train_acc1" in r and "train_loss" in r for r in records)
    scored = [r for r in records if "test_acc1" in r]
    assert [r["epoch"] for r in scored] == [2, 3]
    best = max(r["test_macro_f1"] for r in scored)
    assert progress["best"] == best
    assert progress["best_epoch"] == next(r["epoch"] for r in scored if r["test_macro_f1"] == best)
    assert load_checkpoint(whole / "best.pth")["progress"]["epoch"] == progress["best_epoch"]
    # Checkpoints come when they did; one between two validations has no scores.
    between = load_checkpoint(whole / "checkpoint-0001.pth")["metrics"]
    assert "train_loss" in between and not [name for name in between if name.startswith("test")]
    for record in scored:
        # Three classes of as many images each: the mean of their accuracies is that of all.
        assert record["test_balanced_acc"] == pytest.approx(record["test_acc1"])
        assert record["test_worst_class_acc"] <= record["test_balanced_acc"]


def test_an_undersampled_epoch_has_the_steps_of_its_images(whole):
    progress = newest(whole)["progress"]
    assert (progress["update"], progress["updates_per_epoch"]) == (3 * 6, 6)


@pytest.mark.parametrize("how", ["--stop-at-epoch", "signal"])
def test_a_run_in_two_parts_is_the_run_in_one(uneven, whole, tmp_path, how):
    if how == "signal":
        with stopped_after(9):  # in the second epoch
            train(uneven, tmp_path, *OPTIONS)
        assert newest(tmp_path)["progress"]["samples"] == 6
    else:
        assert train(uneven, tmp_path, *OPTIONS, "--stop-at-epoch", "1") == 0
        # Not validated: the run in one part isn't there either.
        assert [r["epoch"] for r in logged(tmp_path) if "test_acc1" in r] == []
    assert train(uneven, tmp_path, *OPTIONS, "--resume", "auto") == 0
    assert_same_state(newest(tmp_path), newest(whole))
    assert logged(tmp_path) == logged(whole)


def test_patience_is_counted_in_epochs_and_ends_at_a_validation(uneven, tmp_path, capsys):
    options = (*STILL, *EVERY_SECOND, *UNDERSAMPLED, "--epochs", "9", "--early-stop", "1")
    assert train(uneven, tmp_path, *options, "--best-metric", "balanced_acc") == 0
    # Best after 2; after 3 the patience is over, after 4 that is known.
    assert [r["epoch"] for r in logged(tmp_path)] == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert "early stop: no better test_balanced_acc for 2 epochs" in out
    score = logged(tmp_path)[1]["test_balanced_acc"]
    assert f"test_balanced_acc {score:.2f} %" in out
    assert "an epoch has 12 of these images: --sampler undersample" in out


def test_two_processes_undersample_half_each(uneven, tmp_path):
    found = train_together(
        uneven, tmp_path / "run", *UNDERSAMPLED, "--epochs", "1", "--warmup-epochs", "0"
    )
    assert found["progress"]["update"] == 3
