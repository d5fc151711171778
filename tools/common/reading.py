"""Reading every image of a data set, as bytes and as pixels."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from config import Config
from errors import UserError, os_error_text
from pipeline.dataset import ImageDataset, build_parts
from pipeline.formats import open_image
from pipeline.limits import BadImageError, read_regular
from pipeline.workers import auto_num_workers
from tools.common.command import progress
from training.plugins import import_plugins

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 256  # images that are in memory at a time


def parts(config: Config) -> dict[str, ImageDataset]:
    """The training and validation part of the run's data set, without a transform."""
    import_plugins(config.run.plugin)
    train, val = build_parts(config.data, seed=config.run.seed, same_classes=False)
    return {"train": train, "val": val}


def new_folder(path: Path) -> None:
    """Make sure that nothing lies at ``path``. Raises UserError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another --output-dir, or remove it")


def file_of(image: Any) -> bytes | None:
    """The bytes of an image file as of ``Source.open``; None for pixels.

    Raises BadImageError.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return read_regular(image)
        return image.read() if hasattr(image, "read") else None
    except OSError as error:
        raise BadImageError(os_error_text(OSError(*error.args))) from None


def pixels_of(image: Any) -> bytes:
    """An image without a file as bytes that are equal where image and shape are."""
    array = np.asarray(image)
    return f"{array.shape} {array.dtype}".encode() + array.tobytes()


def kind_of(content: bytes) -> tuple[str, str, tuple[int, int]]:
    """Format (``JPEG``), mode (``RGB``) and (width, height) by a file's header.

    Raises BadImageError.
    """
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.format or "?", image.mode, image.size
    except BadImageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise almost anything
        raise BadImageError(str(error) or type(error).__name__) from None


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], what: str
) -> Iterator[Result]:
    """``work`` of each item in their order, with a bar; Pillow's work runs in parallel."""

    def results() -> Iterator[Result]:
        with ThreadPoolExecutor(auto_num_workers(1) or 1) as pool:
            for start in range(0, len(items), BLOCK):
                yield from pool.map(work, items[start : start + BLOCK])

    yield from progress(results(), what, total=len(items))
