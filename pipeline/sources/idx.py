"""MNIST and Fashion-MNIST, in IDX files."""

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import DataError, OptionError
from pipeline.sources.base import ArraySource, Factory, Source, first_existing, refuse_val_fraction
from pipeline.sources.download import download_root, fetch

if TYPE_CHECKING:
    from config import DataOptions

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
    """The uint8 array of an IDX file, plain or gzipped (format: yann.lecun.com/exdb/mnist)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, each size big-endian.
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int).tolist()
    if len(shape) != dimensions or len(content) != start + int(np.prod(shape)):
        raise DataError(f"{path} is damaged: {len(content)} bytes don't fit its sizes {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
