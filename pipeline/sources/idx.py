"""MNIST and Fashion-MNIST, in IDX files."""

import contextlib
import gzip
import math
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

import bounded
from errors import DataError, OptionError, os_error_text
from pipeline.sources.base import ArraySource, Factory, Source, first_existing, refuse_val_fraction
from pipeline.sources.download import download_root, fetch

if TYPE_CHECKING:
    from config import DataOptions

MOST_BYTES = 1 << 30  # of an array; the training images have 45 MiB
_BLOCK = 1 << 20
_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"]
_IDX_CLASSES = {
    "MNIST": [str(digit) for digit in range(10)],
    "FashionMNIST": [*_FASHION, "Bag", "Ankle boot"],
}


def idx(name: str) -> Factory:
    """The factory of MNIST or FashionMNIST."""

    def factory(is_train: bool, data: "DataOptions", seed: int) -> Source:
        refuse_val_fraction(data, name)
        root = download_root(data)
        prefix = "train" if is_train else "t10k"
        if data.download and _find_idx(root, name, f"{prefix}-images") is None:
            from torchvision import datasets as torchvision_datasets

            fetch(lambda: getattr(torchvision_datasets, name)(root, download=True), name, data)
        arrays = []
        for part, dimensions in (("images", 3), ("labels", 1)):
            path = _find_idx(root, name, f"{prefix}-{part}")
            if path is None:
                raise OptionError(
                    "data_path",
                    f"no {prefix}-{part}-idx{dimensions}-ubyte(.gz) in {root}: add --download",
                )
            arrays.append(read_idx(path, dimensions))
        images, labels = arrays
        if len(images) != len(labels):
            raise DataError(f"{path}: {len(labels)} labels for {len(images)} images")
        if labels.max() >= len(_IDX_CLASSES[name]):
            raise DataError(f"{path}: label {labels.max()}, and {name} has 10 classes, 0 to 9")
        return ArraySource(images, labels, _IDX_CLASSES[name], f"{name} {prefix}")

    return factory


def _find_idx(root: Path, name: str, stem: str) -> Path | None:
    folders = (root, root / name / "raw", root / "raw")
    digits = 3 if stem.endswith("images") else 1
    endings = (f"-idx{digits}-ubyte", f".idx{digits}-ubyte")
    return first_existing(
        folder / f"{stem}{ending}{gz}"
        for folder in folders
        for ending in endings
        for gz in ("", ".gz")
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, plain or gzipped (format: yann.lecun.com/exdb/mnist).

    No more is unpacked than the header says, which is ``MOST_BYTES`` at most. Raises DataError.
    """
    try:
        with bounded.opened(path, MOST_BYTES) as file:
            packed = path.suffix == ".gz"
            with gzip.open(file) if packed else contextlib.nullcontext(file) as content:
                return _read_idx(path, content, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        known = isinstance(error, OSError) and error.errno is not None
        why = os_error_text(error, path) if known else f"{path} can't be read: {error}"
        raise DataError(why) from None


def _read_idx(path: Path, file: IO[bytes], dimensions: int) -> np.ndarray:
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, each size big-endian.
    head = file.read(4 + 4 * dimensions)
    if head[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4)]
    size = math.prod(shape)
    if len(shape) != dimensions or not size:
        raise DataError(f"{path} is damaged: its sizes are {shape}")
    if size > MOST_BYTES:
        raise DataError(
            f"{path} is damaged, or too large: sizes {shape}, and no more than "
            f"{bounded.size_text(MOST_BYTES)} are read"
        )
    # Memory that is not written to is not taken: the header may promise what doesn't come.
    array = np.empty(size, dtype=np.uint8)
    into, found = memoryview(array), 0
    while found < size and (count := file.readinto(into[found : found + _BLOCK])):
        found += count
    if found < size or file.read(1):
        raise DataError(
            f"{path} is damaged: {'more' if found == size else found} bytes don't fit its sizes "
            f"{shape}"
        )
    return array.reshape(shape)
