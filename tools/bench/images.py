"""The images that the benchmarks read."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from errors import UserError


def photographs(folder: Path, given: str) -> list[Path]:
    """JPEG files: those of the folder ``given``, or crops of scikit-learn's two photographs.

    The crops are 500×375 pixels at qualities 90 to 96, as ImageNet's are on average.
    """
    if given:
        found = sorted(p for p in Path(given).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not found:
            raise UserError(f"--images: {given} has no JPEG files")
        return found[:200]
    from sklearn.datasets import load_sample_images

    rng = np.random.RandomState(0)
    samples = itertools.islice(itertools.cycle(load_sample_images().images), 40)
    paths = []
    for number, image in enumerate(samples):
        whole = Image.fromarray(image)
        left, top = rng.randint(0, 100), rng.randint(0, 40)
        part = whole.crop((left, top, left + 540, top + 387)).resize((500, 375))
        paths.append(folder / f"{number}.jpg")
        part.save(paths[-1], quality=90 + number % 7)
    return paths


def small_images(count: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and labels: patches of the photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.RandomState(0)
    sources = load_sample_images().images
    images = []
    for number in range(count):
        image = sources[number % 2]
        top, left = rng.randint(0, image.shape[0] - 64), rng.randint(0, image.shape[1] - 64)
        images.append(image[top : top + 64 : 2, left : left + 64 : 2])
    return np.stack(images), rng.randint(0, 10, count)


class TimmDataset(torch.utils.data.Dataset):
    """``count`` images for timm's ``create_loader``, which sets ``transform``."""

    transform: Any = None

    def __init__(self, count: int, read: Callable[[int], tuple[Image.Image, int]]) -> None:
        self.count = count
        self.read = read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.read(index)
        return self.transform(image), label
