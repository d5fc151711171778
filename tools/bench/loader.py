"""Photographs with the DeiT recipe, 224×224: what a worker does, all of it on one core, loaders.

Beside timm's transforms and loader, all on the host.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader, create_transform

from augmentation.batch import BatchAugment
from augmentation.transforms import Preprocessing
from config import AugmentOptions
from errors import OptionError
from pipeline.dataset import ImageDataset
from pipeline.decoding import decode_tensor
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import FileSource
from samplers import ShuffleSampler
from tools.bench.common import MEAN, STD, Row, Rows, add_repeats, bench_parser, compare, run
from tools.bench.images import TimmDataset, photographs

TIMM_RECIPE = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "interpolation": "bicubic",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "re_count": 1,
}


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    if device.type != "cpu":
        raise OptionError("device", "images are decoded on the host: leave it out")
    torch.set_num_threads(1)
    augment = BatchAugment(Preprocessing(224, 0.875, "bicubic", MEAN, STD), AugmentOptions(), 0)
    with tempfile.TemporaryDirectory() as temporary:
        paths = photographs(Path(temporary), arguments.images)
        transform = create_transform(224, is_training=True, mean=MEAN, std=STD, **TIMM_RECIPE)

        def theirs() -> int:
            for path in paths:
                transform(Image.open(path).convert("RGB"))
            return len(paths)

        def share() -> int:
            for number, path in enumerate(paths):
                augment.apply(decode_tensor(str(path)), 0, number)
            augment.plan(0, np.arange(len(paths)))
            return len(paths)

        def everything() -> int:
            crops = [augment.apply(decode_tensor(str(p)), 0, i) for i, p in enumerate(paths)]
            augment(torch.stack(crops), augment.plan(0, np.arange(len(paths))))
            return len(paths)

        repeats = arguments.repeats
        yield compare("a worker's share, against timm's whole chain", share, theirs, repeats)
        yield compare("all of it on one core, against timm's chain", everything, theirs, repeats)
        yield _whole_loaders(paths, augment, max(3, repeats // 2))


def _whole_loaders(paths: Sequence[Path], augment: BatchAugment, repeats: int) -> Row:
    """Both loaders with two workers, batches of 32, up to the model's input."""
    many = [str(p) for p in paths] * max(1, 320 // len(paths))
    source = FileSource(Path("/"), many, [0] * len(many), ["one"])
    ours = Loader(
        ImageDataset(source, augment, is_train=True),
        ShuffleSampler(len(many)),
        LoaderSettings(batch_size=32, num_workers=2, drop_last=True),
    )
    theirs = create_loader(
        TimmDataset(len(many), lambda index: (Image.open(many[index]).convert("RGB"), 0)),
        (3, 224, 224),
        32,
        is_training=True,
        mean=MEAN,
        std=STD,
        num_workers=2,
        use_prefetcher=False,
        persistent_workers=True,
        **TIMM_RECIPE,
    )

    def run_ours() -> int:
        return sum(len(augment(batch.images, batch.plan)) for batch in ours)

    def run_theirs() -> int:
        return sum(len(images) for images, _ in theirs)

    title = "loaders with two workers, up to the model's input"
    return compare(title, run_ours, run_theirs, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("loader", __doc__, device="cpu")
    parser.add_argument("--images", default="", help="a folder of JPEG files")
    add_repeats(parser)
    return run("loader", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
