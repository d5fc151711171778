"""What the tests of the tools share: tiny trained checkpoints and the pictures they learnt."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

import main

COLORS = {"amber": (200, 150, 30), "blue": (40, 60, 200), "crimson": (190, 30, 60)}


def make_pictures(
    root: Path,
    *,
    training: int = 8,
    validation: int = 6,
    colors: Mapping[str, tuple[int, int, int]] = COLORS,
) -> Path:
    """Classes that differ in colour, 20×18 pixels."""
    rng = np.random.default_rng(0)
    for part, count in (("train", training), ("val", validation)):
        for name, color in colors.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-60, 60, (18, 20, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def train(pictures: Path, folder: Path, *more: str) -> Path:
    """A run of two epochs in ``folder``; returns its newest checkpoint."""
    argv = ["--data-path", str(pictures), "--output-dir", str(folder), "--input-size", "16"]
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
