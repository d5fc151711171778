"""Small images from memory, 32×32, one core, beside timm's loader in the same process."""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader

from augmentation.batch import BatchAugment
from augmentation.transforms import Preprocessing
from config import AugmentOptions
from pipeline.cache import apply_cache
from pipeline.dataset import ImageDataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource
from samplers import ShuffleSampler
from tools.bench.common import (
    MEAN,
    STD,
    Row,
    Rows,
    add_repeats,
    bench_parser,
    compare,
    run,
    synchronise,
)
from tools.bench.images import TimmDataset, small_images
from tools.bench.loader import TIMM_RECIPE

# title: our options, timm's
RECIPES = {
    "crop, flip, normalise, erase": (
        AugmentOptions(aa=None, color_jitter=None),
        {"auto_augment": None, "color_jitter": None, "re_prob": 0.25, "re_mode": "pixel"},
    ),
    "the same with RandAugment": (AugmentOptions(), TIMM_RECIPE),
}


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    torch.set_num_threads(1)
    images, labels = small_images()
    for title, (options, timm_options) in RECIPES.items():
        yield _compare(title, images, labels, options, timm_options, arguments.repeats, device)


def _compare(
    title: str,
    images: np.ndarray,
    labels: np.ndarray,
    options: AugmentOptions,
    timm_options: dict[str, object],
    repeats: int,
    device: torch.device,
) -> Row:
    augment = BatchAugment(Preprocessing(32, 1.0, "bicubic", MEAN, STD), options, 0)
    source = ArraySource(images, labels, [str(i) for i in range(10)], "patches")
    uncached = Loader(
        ImageDataset(source, augment, is_train=True),
        ShuffleSampler(len(images)),
        LoaderSettings(batch_size=128, drop_last=True),
    )
    ours = apply_cache("device" if device.type == "cuda" else "ram", uncached, device=device)
    theirs = create_loader(
        TimmDataset(len(images), lambda i: (Image.fromarray(images[i]), int(labels[i]))),
        (3, 32, 32),
        128,
        is_training=True,
        mean=MEAN,
        std=STD,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
        **timm_options,
    )

    def run_ours() -> int:
        count = sum(len(augment(batch.images, batch.plan)) for batch in ours)
        synchronise(device)
        return count

    def run_theirs() -> int:
        return sum(len(batch) for batch, _ in theirs)

    return compare(title, run_ours, run_theirs, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("cache", __doc__)
    add_repeats(parser)
    return run("cache", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
