"""Photographs with the DeiT recipe, 224×224: what a worker does, all of it on one core, loaders.

Of 500×375 pixels, and of 12 megapixels.

Beside timm's transforms and loader, all on the host.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader, create_transform

from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from config import AugmentOptions
from errors import OptionError
from pipeline.dataset import ImageDataset, Sample, collate
from pipeline.decoding import decode_tensor, open_parts
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import FileSource
from samplers import ShuffleSampler
from tools.bench.common import (
    MEAN,
    STD,
    Row,
    Rows,
    add_repeats,
    alone,
    bench_parser,
    compare,
    limit,
    run,
)
from tools.bench.images import TimmDataset, large_photographs, photographs

EPOCH = 1280  # images: both loaders begin and end with nothing made ahead
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
    repeats = arguments.repeats
    augment = BatchAugment(Preprocessing(224, 0.875, "bicubic", MEAN, STD), AugmentOptions(), 0)
    with tempfile.TemporaryDirectory() as temporary:
        if not (arguments.images or arguments.toy):
            # First: in the heap that the other rows leave behind Pillow's large images cost two
            # thirds of what they cost in a new process, or in a worker of torch's DataLoader.
            yield _large(Path(temporary), augment, repeats)
        paths = photographs(Path(temporary), arguments.images)
        bound = decoding_limit("decoding the same files, one core", paths, repeats)
        share, theirs = partial(_share, paths, augment), partial(_timm_chain(), paths)
        title = "a worker's share, against timm's whole chain"
        yield compare(title, share, theirs, repeats, bound)

        def everything() -> int:
            crops = [augment.apply(open_parts(str(p)), 0, i) for i, p in enumerate(paths)]
            batch = collate([Sample(crop, 0, i, 0, i, []) for i, crop in enumerate(crops)])
            augment(batch.images, augment.plan(0, np.arange(len(paths))))
            return len(paths)

        title = "all of it on one core, against timm's chain"
        yield compare(title, everything, theirs, repeats, bound)
        yield _whole_loaders(paths, augment, max(3, repeats // 2), bound["value"])


def _large(folder: Path, augment: BatchAugment, repeats: int) -> Row:
    """A worker's share of large photographs."""
    paths = large_photographs(folder)
    share, theirs = partial(_share, paths, augment), partial(_timm_chain(), paths)
    bound = decoding_limit("decoding the same files at 1/8, one core", paths, repeats, 1)
    title = "a worker's share of 12-megapixel photographs, against timm's whole chain"
    return compare(title, share, theirs, repeats, bound)


def _share(paths: Sequence[Path], augment: BatchAugment) -> int:
    """What a worker does."""
    for number, path in enumerate(paths):
        augment.apply(open_parts(str(path)), 0, number)
    augment.plan(0, np.arange(len(paths)))
    return len(paths)


def _timm_chain() -> Callable[[Sequence[Path]], int]:
    """All that timm does with images of these paths."""
    transform = create_transform(224, is_training=True, mean=MEAN, std=STD, **TIMM_RECIPE)

    def theirs(paths: Sequence[Path]) -> int:
        for path in paths:
            transform(Image.open(path).convert("RGB"))
        return len(paths)

    return theirs


def decoding_limit(what: str, paths: Sequence[Path], repeats: int, side: int | None = None) -> Row:
    """The rate of decoding alone; with ``side``, as small as leaves so many pixels of a side."""

    def decoding() -> int:
        for path in paths:
            decode_tensor(str(path), short_side=side)
        return len(paths)

    return limit(what, alone(what, decoding, repeats)["ours"])


def _whole_loaders(
    paths: Sequence[Path], augment: BatchAugment, repeats: int, decoding: float
) -> Row:
    """Both loaders with two workers, batches of 32, up to the model's input.

    ``decoding``: images per second that a core decodes at most.
    """
    many = [str(p) for p in paths] * max(1, EPOCH // len(paths))
    source = FileSource(Path("/"), many, [0] * len(many), ["one"])
    ours = Loader(
        ImageDataset(source, augment, is_train=True),
        ShuffleSampler(len(many)),
        LoaderSettings(batch_size=32, num_workers=2, drop_last=True, alter=True),
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
    bound = limit("decoding the same files, twice the rate of one core", 2 * decoding)
    return compare(title, run_ours, run_theirs, repeats, bound)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("loader", __doc__, device="cpu")
    parser.add_argument("--images", default="", help="a folder of JPEG files")
    add_repeats(parser)
    return run("loader", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
