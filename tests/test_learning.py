"""Learning on real images: scikit-learn's digits, and Fashion-MNIST where it is installed."""

from fashion_mnist import first_images, needs_fashion_mnist
from runs import PLAIN, logged, train

SMOOTHED = ("--smoothing", "0.1", "--unscale-lr", "--lr", "3e-3")


def test_a_small_cnn_learns_the_digits(tmp_path):
    options = (*PLAIN, *SMOOTHED, "--data-set", "DIGITS", "--model", "simple_cnn")
    options += ("--input-size", "8", "--epochs", "4", "--batch-size", "32", "--hflip", "0")
    options += ("--log-interval", "50", "--val-interval", "4")
    assert train("", tmp_path, *options, "--model-ema-decay", "0.9") == 0
    record = logged(tmp_path)[-1]
    assert record["test_acc1"] > 95 and record["ema_acc1"] > 95
    assert record["test_acc5"] > 99


@needs_fashion_mnist
def test_a_small_cnn_learns_fashion_mnist(tmp_path):
    """Three epochs on 3,000 of the real training images, tested on 1,000 of the test set."""
    data = first_images(tmp_path / "data", train=3000, test=1000)
    options = (*PLAIN, *SMOOTHED, "--data-set", "FMNIST", "--model", "modern_lenet")
    options += ("--input-size", "28", "--warmup-epochs", "0", "--batch-size", "40")
    options += ("--num-workers", "1", "--model-ema-decay", "0.95", "--log-interval", "50")
    options += ("--val-interval", "3")
    assert train(data, tmp_path / "run", *options) == 0
    record = logged(tmp_path / "run")[-1]
    assert max(record["test_acc1"], record["ema_acc1"]) > 72
    assert (tmp_path / "run" / "per_class.csv").read_text().count("\n") == 11
    assert "Ankle boot" in (tmp_path / "run" / "per_class.csv").read_text()
