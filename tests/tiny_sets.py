"""Data sets of a few images with known pixels: what the tests of the pipeline share."""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Transform
from augmentation.transforms import build_transform
from config import AugmentOptions, DataOptions
from pipeline.dataset import Batch, ImageDataset, build_dataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource
from samplers import EpochSampler, EvalSampler

SMALL = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
AUGMENT = AugmentOptions(scale=(0.3, 1.0))
EVAL = build_transform(False, SMALL, AUGMENT)


def train_transform(seed: int = 3) -> Transform:
    """Augmentation one by one, for inputs of 16 pixels."""
    return build_transform(True, SMALL, AUGMENT, seed=seed)


def noise(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    """Random pixels, (height, width, 3) uint8."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    """``noise(seed)`` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, seed: int = 0, **options: Any) -> Path:
    """Write ``noise(seed)`` to ``path``, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path, **options)
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 values in MNIST's format, gzipped where the name says so; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + array.tobytes())


def expected(seed: int) -> torch.Tensor:
    """``noise(seed)`` as evaluation shows it to a model, (3, 16, 16)."""
    return EVAL(Image.fromarray(noise(seed)))


def open_set(
    name: str, path: Path | str, is_train: bool = True, *, seed: int = 0, **options: Any
) -> ImageDataset:
    """A part of ``--data-set name --data-path path``, without augmentation."""
    data = DataOptions(data_set=name, data_path=str(path), **options)
    return build_dataset(is_train, data, seed=seed).with_transform(EVAL)


def array_set(
    count: int = 13, *, is_train: bool = True, transform: Transform | None = None
) -> ImageDataset:
    """``noise(0)``, ``noise(1)``, … in three classes, augmented if no other transform is given."""
    images = np.stack([noise(i) for i in range(count)])
    source = ArraySource(images, np.arange(count) % 3, ["a", "b", "c"], "arrays")
    return ImageDataset(source, transform or train_transform(), is_train=is_train)


def load(
    dataset: ImageDataset,
    sampler: EpochSampler | EvalSampler,
    num_workers: int = 0,
    batch_size: int = 4,
    drop_last: bool = False,
) -> list[Batch]:
    """All batches of one pass."""
    settings = LoaderSettings(
        batch_size, num_workers=num_workers, pin_memory=True, drop_last=drop_last
    )
    loader = Loader(dataset, sampler, settings)
    batches = list(loader)
    assert len(loader) == len(batches)
    return batches


def assert_same(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    """Every field of every batch is equal."""
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for mine, theirs in zip(batch, other, strict=True):
            assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs
