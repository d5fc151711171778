"""What the tests of tools.data share: writing images, and reading what was written."""

from pathlib import Path

import numpy as np
from PIL import Image

import config
from pipeline.dataset import ImageDataset, build_dataset

CLASSES = ("ant", "bee", "cat")


def save(path: Path, pixels: np.ndarray, **options) -> None:
    """An image file of (H, W) or (H, W, 3) pixels; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)


def open_part(data_set: str, path: Path, is_train: bool = True) -> ImageDataset:
    """The training or validation part of a data set."""
    options = config.DataOptions(data_set=data_set, data_path=str(path))
    return build_dataset(is_train, options, seed=0)


def contents(dataset: ImageDataset) -> list[tuple[bytes, int]]:
    """Bytes and label of each image."""
    found = []
    for index in range(len(dataset)):
        image, label = dataset.source.read(index)
        found.append((image.read() if hasattr(image, "read") else Path(image).read_bytes(), label))
    return found
