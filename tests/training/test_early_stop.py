"""Early stopping, seen from outside: after how many epochs runs end."""

from runs import PLAIN, logged, newest, train

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
    assert progress["best"] == losses[2] and progress["best_epoch"] == 2
