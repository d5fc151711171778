"""Small images from memory, beside timm's loader; photographs from disk, beside timm's chain.

All on one core, in one process. What is compared of photographs is what a loader worker does: with
``--cache disk`` at 256 pixels it crops and resizes, timm's chain decodes the originals.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader, create_transform

from augmentation.batch import BatchAugment
from augmentation.crops import resize
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Cut
from config import AugmentOptions
from pipeline.cache import apply_cache
from pipeline.dataset import ImageDataset
from pipeline.disk_cache import DiskOptions, disk_cached
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource, FileSource
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
    synchronise,
)
from tools.bench.images import TimmDataset, large_photographs, photographs, small_images
from tools.bench.limits import copy_rate
from tools.bench.loader import TIMM_RECIPE, decoding_limit

EPOCH = 40  # photographs
PASSES = 10  # over what is kept in a turn: one takes 15 ms, most of them with cold caches
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"500×375": photographs(folder, "")}
        if not arguments.toy:
            sizes["12 megapixels"] = large_photographs(folder)
        for size, paths in sizes.items():
            yield from _from_disk(size, paths, folder / size, max(3, arguments.repeats // 2))


def _from_disk(size: str, paths: Sequence[Path], folder: Path, repeats: int) -> Rows:
    """A worker's share of photographs that are kept on disk, and of the epoch that fills it."""
    augment = BatchAugment(Preprocessing(224, 0.875, "bicubic", MEAN, STD), AugmentOptions(), 0)
    chain = create_transform(224, is_training=True, mean=MEAN, std=STD, **TIMM_RECIPE)
    many = [str(path) for path in paths] * (EPOCH // len(paths))
    dataset = ImageDataset(
        FileSource(Path("/"), many, [0] * len(many), ["one"]), augment, is_train=True
    )
    filled = itertools.count()

    def loader(folder: Path) -> Loader:
        settings = LoaderSettings(batch_size=EPOCH)
        plain = Loader(dataset, ShuffleSampler(len(many)), settings)
        return disk_cached(plain, DiskOptions(str(folder), 10**12, 256), visible=False)

    def run(loader: Loader) -> int:
        return sum(len(batch.images) for batch in loader)

    def theirs() -> int:
        for path in paths:
            chain(Image.open(path).convert("RGB"))
        return len(paths)

    kept = loader(folder / "kept")
    run(kept)
    source = kept.dataset.source
    pixels = [torch.from_numpy(source.open(i)).permute(2, 0, 1) for i in range(EPOCH)]

    def resizing() -> int:
        for image in pixels:
            resize(Cut(image[:, :200, :200]), (224, 224), "bicubic")
        return len(pixels)

    bound = limit("resizing crops of 200×200 alone", alone("limit", resizing, repeats)["ours"])
    title = f"disk cache at 256, {size}: a worker's share, against timm's chain on the originals"
    yield compare(title, lambda: sum(run(kept) for _ in range(PASSES)), theirs, repeats, bound)
    title = f"disk cache at 256, {size}: the epoch that fills it"
    bound = decoding_limit("decoding for a short side of 256, one core", paths, repeats, 256)
    yield compare(title, lambda: run(loader(folder / str(next(filled)))), theirs, repeats, bound)


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

    rate = copy_rate(device) / (images[0].size * 5)
    bound = limit("bytes read, floats written once", rate)
    return compare(title, run_ours, run_theirs, repeats, bound)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("cache", __doc__)
    add_repeats(parser)
    return run("cache", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
