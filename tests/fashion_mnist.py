"""Some images of the real Fashion-MNIST, where it is installed."""

from pathlib import Path

import numpy as np
import pytest
from tiny_sets import write_idx

from pipeline.sources.idx import read_idx

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
needs_fashion_mnist = pytest.mark.skipif(
    not INSTALLED.exists(), reason="needs Debian's dataset-fashion-mnist"
)


def first_images(folder: Path, *, train: int, test: int, random_labels: float = 0.0) -> Path:
    """A ``folder`` of IDX files with the first images of each part.

    A share ``random_labels`` of the training labels is drawn anew from all ten classes.
    """
    for part, count in (("train", train), ("t10k", test)):
        labels = read_idx(INSTALLED / f"{part}-labels-idx1-ubyte.gz", 1)[:count].copy()
        if part == "train":
            generator = np.random.default_rng(0)
            drawn = generator.permutation(count)[: int(random_labels * count)]
            labels[drawn] = generator.integers(0, 10, len(drawn))
        images = read_idx(INSTALLED / f"{part}-images-idx3-ubyte.gz", 3)[:count]
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder
