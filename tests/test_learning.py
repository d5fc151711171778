"""Learning on real pictures: scikit-learn's digits, and Fashion-MNIST where it is installed."""

import gzip
import json
from pathlib import Path

import pytest

import main
from datasets import read_idx

FASHION = Path("/usr/share/datasets/fashion-mnist")


def last(folder: Path) -> dict:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def test_a_small_cnn_learns_the_digits(tmp_path):
    argv = [
        "--data-set",
        "DIGITS",
        "--model",
        "simple_cnn",
        "--input-size",
        "16",
        "--device",
        "cpu",
    ]
    argv += ["--epochs", "6", "--warmup-epochs", "1", "--batch-size", "32", "--num-workers", "0"]
    argv += ["--lr", "3e-3", "--unscale-lr", "--no-repeated-aug", "--hflip", "0", "--aa", "none"]
    argv += [
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--color-jitter",
        "none",
        "--reprob",
        "0",
        "--no-tensorboard",
    ]
    assert main.main([*argv, "--output-dir", str(tmp_path), "--model-ema-decay", "0.9"]) == 0
    record = last(tmp_path)
    assert record["test_acc1"] > 95 and record["ema_acc1"] > 95
    assert record["test_acc5"] > 99


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_a_small_cnn_learns_fashion_mnist(tmp_path):
    """Three epochs on 6,000 of the real training pictures, judged on 2,000 of the test set."""
    (tmp_path / "data").mkdir()
    for part, count in (("train", 6000), ("t10k", 2000)):
        for kind, dimensions in (("images", 3), ("labels", 1)):
            name = f"{part}-{kind}-idx{dimensions}-ubyte.gz"
            array = read_idx(FASHION / name, dimensions)[:count]
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            with gzip.open(tmp_path / "data" / name, "wb", compresslevel=1) as file:
                file.write(bytes([0, 0, 8, dimensions]) + sizes + array.tobytes())
    argv = ["--data-set", "FMNIST", "--data-path", str(tmp_path / "data"), "--device", "cpu"]
    argv += [
        "--model",
        "modern_lenet",
        "--input-size",
        "28",
        "--epochs",
        "3",
        "--warmup-epochs",
        "0",
    ]
    argv += ["--batch-size", "40", "--num-workers", "1", "--lr", "3e-3", "--unscale-lr"]
    argv += [
        "--no-repeated-aug",
        "--aa",
        "none",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--color-jitter",
        "none",
        "--reprob",
        "0",
    ]
    argv += ["--model-ema-decay", "0.95", "--no-tensorboard", "--output-dir", str(tmp_path / "run")]
    assert main.main(argv) == 0
    record = last(tmp_path / "run")
    assert max(record["test_acc1"], record["ema_acc1"]) > 74
    assert (tmp_path / "run" / "per_class.csv").read_text().count("\n") == 11
    assert "Ankle boot" in (tmp_path / "run" / "per_class.csv").read_text()
