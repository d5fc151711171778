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
    rng = np.random.RandomState(0)
    paths = []
    for number, whole in enumerate(itertools.islice(itertools.cycle(_samples()), 40)):
        left, top = rng.randint(0, 100), rng.randint(0, 40)
        part = whole.crop((left, top, left + 540, top + 387)).resize((500, 375))
        paths.append(folder / f"{number}.jpg")
        part.save(paths[-1], quality=90 + number % 7)
    return paths


def large_photographs(folder: Path, count: int = 4) -> list[Path]:
    """JPEG files of 4032×3024 pixels, as telephones make them, of 3 to 5 MB.

    They are tiled with scikit-learn's photographs, turned and mirrored, so that they are as rich
    in detail as those and take as long to decode.
    """
    samples, turns = _samples(), (None, *Image.Transpose)
    paths = []
    for number in range(count):
        rng = np.random.RandomState(number)
        whole = Image.new("RGB", (4032, 3024))
        for left, top in itertools.product(range(0, 4032, 400), range(0, 3024, 400)):
            tile, turn = samples[rng.randint(2)], turns[rng.randint(len(turns))]
            whole.paste(tile if turn is None else tile.transpose(turn), (left, top))
        paths.append(folder / f"large-{number}.jpg")
        whole.save(paths[-1], quality=90)
    return paths


def _samples() -> list[Image.Image]:
    """scikit-learn's two photographs, 640×427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def small_images(count: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and labels: patches of the photographs."""
    rng = np.random.RandomState(0)
    sources = [np.asarray(image) for image in _samples()]
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
