"""Finding the image files of ImageNet: 1,000 folders of empty files with its names.

Beside torchvision's ImageFolder and timm's reader. The limit is os.scandir over the same folders.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from config import DataOptions
from errors import OptionError
from pipeline.dataset import build_dataset
from tools.bench.common import Rows, add_repeats, alone, bench_parser, compare, limit, run
from tools.common import command


def make_tree(root: Path, images: int, classes: int) -> None:
    """``train/CLASS/FILE`` with ``images`` files in all, and ``val`` with a file in each class."""
    names = random.Random(0)
    for wnid in sorted(names.sample(range(1_440_764, 15_075_141), classes)):
        folders = [root / part / f"n{wnid:08d}" for part in ("train", "val")]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in names.sample(range(20 * images // classes + 1), images // classes):
            (folders[0] / f"n{wnid:08d}_{number}.JPEG").touch()
        (folders[1] / f"ILSVRC2012_val_{wnid:08d}.JPEG").touch()


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    if device.type != "cpu":
        raise OptionError("device", "files are found by the host: leave it out")
    classes = min(1000, max(1, arguments.images // 100))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_tree(root, arguments.images, classes)
        options = DataOptions(data_set="IMNET", data_path=temporary)

        def ours() -> int:
            return len(build_dataset(True, options, seed=0))

        def bare() -> int:
            folders = [entry.path for entry in os.scandir(root / "train")]
            return sum(sum(1 for _ in os.scandir(folder)) for folder in folders)

        others = {
            "torchvision's ImageFolder": lambda: len(ImageFolder(root / "train")),
            "timm's create_dataset": lambda: len(create_dataset("", temporary, split="train")),
        }
        repeats = arguments.repeats
        rate = alone("os.scandir", bare, repeats)["ours"]
        floor = limit("os.scandir over the same folders", rate)
        files = f"{arguments.images // classes * classes:,} files in {classes:,} folders"
        for name, theirs in others.items():
            yield compare(f"{files}, against {name}", ours, theirs, repeats, floor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("scan", __doc__, device="cpu")
    parser.add_argument(
        "--images", type=command.positive, default=1_281_000, help="files (default: %(default)s)"
    )
    add_repeats(parser, default=5)
    return run("scan", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
