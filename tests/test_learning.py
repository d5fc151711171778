"""Learning on real images: scikit-learn's digits, and Fashion-MNIST where it is installed."""

import gzip
from pathlib import Path

import pytest
from runs import PLAIN, logged, train

from pipeline.sources.idx import read_idx

FASHION = Path("/usr/share/datasets/fashion-mnist")
SMOOTHED = ("--smoothing", "0.1", "--unscale-lr", "--lr", "3e-3")


def test_a_small_cnn_learns_the_digits(tmp_path):
    options = (*PLAIN, *SMOOTHED, "--data-set", "DIGITS", "--model", "simple_cnn")
    options += ("--input-size", "16", "--epochs", "6", "--batch-size", "32", "--hflip", "0")
    options += ("--log-interval", "50")
    assert train("", tmp_path, *options, "--model-ema-decay", "0.9") == 0
    record = logged(tmp_path)[-1]
    assert record["test_acc1"] > 95 and record["ema_acc1"] > 95
    assert record["test_acc5"] > 99


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_a_small_cnn_learns_fashion_mnist(tmp_path):
    """Three epochs on 6,000 of the real training images, tested on 2,000 of the test set."""
    (tmp_path / "data").mkdir()
    for part, count in (("train", 6000), ("t10k", 2000)):
        for kind, dimensions in (("images", 3), ("labels", 1)):
            name = f"{part}-{kind}-idx{dimensions}-ubyte.gz"
            array = read_idx(FASHION / name, dimensions)[:count]
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            with gzip.open(tmp_path / "data" / name, "wb", compresslevel=1) as file:
                file.write(bytes([0, 0, 8, dimensions]) + sizes + array.tobytes())
    options = (*PLAIN, *SMOOTHED, "--data-set", "FMNIST", "--model", "modern_lenet")
    options += ("--input-size", "28", "--warmup-epochs", "0", "--batch-size", "40")
    options += ("--num-workers", "1", "--model-ema-decay", "0.95", "--log-interval", "50")
    assert train(tmp_path / "data", tmp_path / "run", *options) == 0
    record = logged(tmp_path / "run")[-1]
    assert max(record["test_acc1"], record["ema_acc1"]) > 74
    assert (tmp_path / "run" / "per_class.csv").read_text().count("\n") == 11
    assert "Ankle boot" in (tmp_path / "run" / "per_class.csv").read_text()
