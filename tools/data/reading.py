"""Reading every picture of a data set, as bytes and as pixels."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

import datasets
import utils
from config import Config
from errors import UserError
from tools.command import progress

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 256  # pictures that are in memory at a time


def parts(config: Config) -> dict[str, datasets.ImageDataset]:
    """The training and validation part of the run's data set, without a transform."""
    utils.import_plugins(config.run.plugin)
    return {
        name: datasets.build_dataset(name == "train", config.data, None, seed=config.run.seed)
        for name in ("train", "val")
    }


def new_folder(path: Path) -> None:
    """Make sure that nothing lies at ``path``. Raises UserError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another --output-dir, or remove it")


def file_of(picture: Any) -> bytes | None:
    """The bytes of a picture file as of ``Source.open``; None for pixels.

    Raises BadPictureError.
    """
    try:
        if isinstance(picture, str | os.PathLike):
            return Path(picture).read_bytes()
        return picture.read() if hasattr(picture, "read") else None
    except OSError as error:
        raise datasets.BadPictureError(error.strerror or str(error)) from None


def pixels_of(picture: Any) -> bytes:
    """A picture without a file as bytes that are equal where picture and shape are."""
    array = np.asarray(picture)
    return f"{array.shape} {array.dtype}".encode() + array.tobytes()


def kind_of(content: bytes) -> tuple[str, str, tuple[int, int]]:
    """Format (``JPEG``), mode (``RGB``) and (width, height) by a file's header.

    Raises BadPictureError.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format or "?", image.mode, image.size
    except UnidentifiedImageError:
        raise datasets.BadPictureError("not a picture that Pillow can read") from None
    except Exception as error:  # Pillow's plug-ins raise almost anything
        raise datasets.BadPictureError(str(error) or type(error).__name__) from None


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], what: str
) -> Iterator[Result]:
    """``work`` of each item in their order, with a bar; Pillow's work runs in parallel."""

    def results() -> Iterator[Result]:
        with ThreadPoolExecutor(datasets.auto_num_workers(1) or 1) as pool:
            for start in range(0, len(items), BLOCK):
                yield from pool.map(work, items[start : start + BLOCK])

    yield from progress(results(), what, total=len(items))
