"""Tiny image folders: the one maker for all tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"amber": (200, 150, 30), "blue": (40, 60, 200), "crimson": (190, 30, 60)}


def tiny_image(colour: Sequence[int], size: tuple[int, int], seed: int) -> Image.Image:
    """An image of (width, height) ``size`` in one colour with noise, so that classes can be learnt
    and no two images are the same."""
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def image_folder(
    root: Path,
    parts: Mapping[str, int] | None = None,
    *,
    classes: Sequence[str] = tuple(COLOURS),
    size: tuple[int, int] = (14, 12),
    suffix: str = ".png",
) -> Path:
    """``root`` with PART/CLASS/NUMBER.png; ``parts`` is {"train": 8, "val": 3}, images per class.

    The part "" puts the class folders into ``root`` itself.
    """
    palette = list(COLOURS.values())
    for start, (part, count) in enumerate((parts or {"train": 8, "val": 3}).items()):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed = 10_000 * start + 100 * label + i
                colour = COLOURS.get(name, palette[label % len(palette)])
                tiny_image(colour, size, seed).save(folder / f"{i}{suffix}")
    return root
