"""What is known of each image of a data set, and the normalisation that follows from it."""

import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from augmentation.protocol import RGB, Form
from config import Config
from pipeline.bands import decode_bands
from pipeline.dataset import ImageDataset
from pipeline.decoding import BadImageError, decode, is_transparent, naming_lack_of_memory
from pipeline.sources.base import Target
from tools.common import command, reading

OPTIONS_FILE = "normalisation.yaml"


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image."""

    index: int
    labels: tuple[int, ...]
    """Its class; of a multi-label set any number of them."""
    digest: bytes
    """Equal for files, or pixels, that are equal."""
    form: str
    """The file's format, or "pixels"."""
    mode: str
    """Pillow's colour mode, or the number of bands."""
    size: tuple[int, int]
    """Width and height, as stored."""
    mean: tuple[float, ...]
    """Of each channel, 0–1."""
    square: tuple[float, ...]
    """Mean of their squares."""
    problem: str = ""
    """Why the image can't be read."""
    transparent: bool = False
    """Whether any of its pixels is."""


def measure_image(
    dataset: ImageDataset, index: int, background: str, form: Form = RGB
) -> ImageFacts:
    """Read an image and measure it as a model of ``form`` takes it, on ``background``; one that
    can't be read has a ``problem``."""
    labels = () if dataset.targets is None else _labels_of(dataset.targets[index])
    digest, kind, mode, size = b"", "?", "?", (0, 0)
    try:
        encoded, target = dataset.source.read(index)
        labels = _labels_of(target)
        content = reading.file_of(encoded)
        raw = reading.pixels_of(encoded) if content is None else content
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if content is not None:
            encoded = io.BytesIO(content)
        transparent = form == RGB and is_transparent(encoded)
        pixels = _pixels(encoded, form, background)
        if content is None:
            kind, size = "pixels", (pixels.shape[1], pixels.shape[0])
            mode = "L" if np.asarray(encoded).ndim == 2 else "RGB"
        else:
            kind, mode, size = _kind_of(content, pixels, form)
        with naming_lack_of_memory():
            values = pixels.reshape(-1, form.channels).astype(np.float32) / form.levels
            means = (tuple(x.mean(0).tolist()) for x in (values, values**2))
            return ImageFacts(
                index, labels, digest, kind, mode, size, *means, transparent=transparent
            )
    except (BadImageError, OSError) as error:
        return ImageFacts(index, labels, digest, kind, mode, size, (), (), str(error))


def measure_images(
    dataset: ImageDataset, name: str, limit: int | None, background: str, form: Form = RGB
) -> list[ImageFacts]:
    """The facts of every image, or of ``limit`` of them in even distances."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    return list(
        reading.in_threads(
            functools.partial(measure_image, dataset, background=background, form=form),
            indices,
            f"read {name}",
        )
    )


def _pixels(encoded: Any, form: Form, background: str) -> np.ndarray:
    """(H, W, C) levels of an image."""
    if form == RGB:
        return np.asarray(decode(encoded, background))
    return decode_bands(encoded, form, background).numpy().transpose(1, 2, 0)


def _kind_of(content: bytes, pixels: np.ndarray, form: Form) -> tuple[str, str, tuple[int, int]]:
    """Format, mode and size by the header; where Pillow has no mode, by what was read."""
    try:
        return reading.kind_of(content)
    except BadImageError:
        if form == RGB:
            raise
        height, width, bands = pixels.shape
        return "numbers", f"{bands} bands", (width, height)


def _labels_of(target: Target) -> tuple[int, ...]:
    return (int(target),) if np.ndim(target) == 0 else tuple(np.flatnonzero(target).tolist())


# --- normalisation -------------------------------------------------------------------------------


def normalisation(good: Sequence[ImageFacts]) -> dict[str, list[float]]:
    """Mean and std of each channel, every image having the same weight."""
    if not good:
        return {"mean": [], "std": []}
    mean = np.mean([x.mean for x in good], axis=0)
    std = np.sqrt(np.mean([x.square for x in good], axis=0) - mean**2)
    return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}


def recipe(config: Config, part: dict[str, Any]) -> dict[str, Any]:
    """The options of images like those of the training part, with its mean and std."""
    values = {"in_chans": config.model.in_chans, "bit_depth": config.data.bit_depth}
    kind = {name: value for name, value in values.items() if name in config.explicit()}
    return {**kind, "mean": part["mean"], "std": part["std"]}


def write_options(folder: Path, options: dict[str, Any]) -> str:
    """Write ``options`` as a recipe for ``--config``; returns them as a line to paste."""
    lines = [f"{name}: {value}" for name, value in options.items()]
    command.write_text(folder / OPTIONS_FILE, "\n".join(lines) + "\n")
    texts = {n: " ".join(map(str, v)) if isinstance(v, list) else v for n, v in options.items()}
    return " ".join(f"--{name.replace('_', '-')} {text}" for name, text in texts.items())
