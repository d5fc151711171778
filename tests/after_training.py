"""What the tests of the tools share: a tiny training."""

import logging
from pathlib import Path

import main


def train(images: Path, folder: Path, *more: str) -> Path:
    """A run of two epochs in ``folder``; returns its newest checkpoint."""
    argv = ["--data-path", str(images), "--output-dir", str(folder), "--input-size", "16"]
    argv += ["--model", "deit_nano_patch4_32", "--batch-size", "6", "--epochs", "2"]
    argv += ["--warmup-epochs", "0", "--num-workers", "0", "--device", "cpu", "--lr", "0.002"]
    argv += ["--unscale-lr", "--no-tensorboard", "--aa", "none", "--mixup", "0", "--cutmix", "0"]
    argv += ["--reprob", "0", "--color-jitter", "0", "--model-ema-decay", "0.5"]
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    assert main.main([*argv, *more]) == 0
    # A run's messages go to standard output, a tool's own don't.
    root.handlers[:] = handlers
    root.setLevel(level)
    return folder / "checkpoint-0002.pth"
