"""When a run ends, and that it stays there when the same command comes again."""

import pytest
from runs import PLAIN, logged, newest, stopped_after, train

from checkpointing.files import load_checkpoint

# Nothing learns at a rate of zero, so the first epoch is the best.
STILL = ("--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--epochs", "6", "--save-every", "9")


def test_a_run_without_progress_stops_after_the_patience(images, tmp_path, capsys):
    assert train(images, tmp_path, *STILL, "--early-stop", "2") == 0
    assert len(logged(tmp_path)) == 3
    # The last epoch is on disk, though neither --save-every nor a better score asks for it.
    assert newest(tmp_path)["progress"]["epoch"] == 3
    assert "early stop: no better test_acc1 for 2 epochs" in capsys.readouterr().out


def test_patience_outlasts_a_resume(images, tmp_path):
    options = (*STILL, "--early-stop", "3")
    assert train(images, tmp_path, *options, "--stop-at-epoch", "2") == 0
    assert train(images, tmp_path, *options, "--resume", "auto") == 0
    assert len(logged(tmp_path)) == 4


def test_the_delta_is_what_counts_as_progress(images, tmp_path):
    """A slow, steady descent: each step is less than the delta, two together are more."""
    options = (*PLAIN, "--opt", "sgd", "--lr", "2e-3", "--sched", "constant", "--epochs", "6")
    options += ("--warmup-epochs", "0", "--best-metric", "train_loss", "--no-model-ema")
    options += ("--weight-decay", "0", "--batch-size", "24", "--early-stop", "2")
    assert train(images, tmp_path / "none", *options) == 0
    losses = [record["train_loss"] for record in logged(tmp_path / "none")]
    assert len(losses) == 6
    steps = [a - b for a, b in zip(losses, losses[1:], strict=False)]
    pairs = [a - b for a, b in zip(losses, losses[2:], strict=False)]
    assert 0 < max(steps) < min(pairs)
    between = (max(steps) + min(pairs)) / 2
    # Patience is for two epochs, and every second one brings progress since the last progress.
    assert train(images, tmp_path / "between", *options, "--early-stop-delta", str(between)) == 0
    assert logged(tmp_path / "between") == logged(tmp_path / "none")
    # More than two steps together: two epochs after the first there is no progress yet.
    above = max(pairs) * 1.1
    assert train(images, tmp_path / "above", *options, "--early-stop-delta", str(above)) == 0
    assert len(logged(tmp_path / "above")) == 3
    # What is best is a matter of the metric alone.
    progress = newest(tmp_path / "above")["progress"]
    assert progress["best"] == losses[2] and progress["best_epoch"] == 3


# --- the same command again ---


def files(folder):
    """What lies in a run's folder, but for what each session leaves."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.log", "run.lock"))
    return {p.relative_to(folder): p.read_bytes() for p in found}


ENDS = {
    "early stop": (
        (*STILL, "--early-stop", "2"),
        3,
        "early stop: no better test_acc1 for 2 epochs",
    ),
    "stop at epoch": (("--stop-at-epoch", "2"), 2, "--stop-at-epoch 2: 2 epochs are done"),
    "finished": ((), 3, "3 of 3 epochs are done"),
}


@pytest.mark.parametrize("options, epochs, why", ENDS.values(), ids=ENDS.keys())
def test_the_same_command_trains_nothing_more(images, tmp_path, capsys, options, epochs, why):
    for _ in range(2):
        assert train(images, tmp_path, *options, "--resume", "auto") == 0
        assert [r["epoch"] for r in logged(tmp_path)] == list(range(1, epochs + 1))
    before = files(tmp_path)
    capsys.readouterr()
    assert train(images, tmp_path, *options, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert f"nothing left to train: {why}" in out and str(tmp_path / "best.pth") in out
    assert files(tmp_path) == before


def test_a_stop_holds_in_the_epoch_after_it(images, tmp_path, capsys):
    """A checkpoint within the third epoch has two done."""
    with stopped_after(14):
        train(images, tmp_path)
    assert newest(tmp_path)["progress"]["samples"] > 0
    assert train(images, tmp_path, "--stop-at-epoch", "2", "--resume", "auto") == 0
    assert "nothing left to train: --stop-at-epoch 2" in capsys.readouterr().out
    assert len(logged(tmp_path)) == 2


@pytest.mark.parametrize(
    "more, epochs",
    [
        (("--early-stop", "4"), 5),
        (("--early-stop", "0"), 6),
        (("--best-metric", "test_loss"), 5),
        (("--epochs", "9"), 5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_what_goes_on_after_an_early_stop(images, tmp_path, more, epochs):
    """Nothing learns; the loss doesn't move either, so a new metric has two epochs again."""
    stopped = (*STILL, "--early-stop", "2")
    assert train(images, tmp_path, *stopped) == 0
    for _ in range(2):  # and the new end holds too
        assert train(images, tmp_path, *stopped, "--resume", "auto", *more) == 0
        assert len(logged(tmp_path)) == epochs


def test_a_best_that_was_not_named_is_named_at_the_end(images, tmp_path):
    options = ("--best-metric", "train_loss")
    assert train(images, tmp_path, *options) == 0
    assert newest(tmp_path)["progress"]["best_epoch"] == 3
    (tmp_path / "best.pth").unlink()
    assert train(images, tmp_path, *options, "--resume", "auto") == 0
    assert load_checkpoint(tmp_path / "best.pth")["progress"]["epoch"] == 3
