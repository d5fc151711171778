"""What is kept of decoded images, on disk and in packed sets: their pixels, room and key."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from augmentation.crops import resize_around
from augmentation.protocol import RGB, Form, Parts
from augmentation.transforms import CentreCrop
from pipeline.bands import decode_bands, tensor_of
from pipeline.decoding import decode, naming_lack_of_memory, open_parts
from pipeline.image_file import HEADER_BYTES, KEY_BYTES, ROW_BYTES
from pipeline.limits import BadImageError
from pipeline.memory import probes, size_of
from pipeline.sources.base import FileSource, Source

VERSION = 1  # of the pixels: another number where they are made in another way
SPOTS = 4096  # images whose names are part of the key, where each takes a while to find
DECODED_SPOTS = 8  # images that are decoded, where nothing else shows what is asked for


def small_pixels(
    encoded: Any, side: int, background: str, *, scaled: bool, form: Form = RGB
) -> np.ndarray:
    """An image as it is kept for training, uint8 or uint16 (H, W, C). Raises BadImageError.

    Args:
        encoded: what ``Source.read`` gives.
        side: of its short side at most so many pixels are kept; 0: all.
        background: of transparent images.
        scaled: whether a large JPEG file of colours may be decoded at a part of its size.
        form: of the images.
    """
    opened = open_parts if form == RGB else partial(decode_bands, form=form)
    image = opened(encoded, background=background)
    image = image if isinstance(image, Parts) else Parts(image)
    with naming_lack_of_memory():
        if not side or min(image.size) <= side:
            return rows_of(image.whole().pixels)
        return rows_of(resize_around(image, (side, side), "bicubic", side if scaled else None))


def exact_pixels(encoded: Any, transform: CentreCrop) -> np.ndarray:
    """What evaluation sees of an image, uint8 or uint16 (H, W, C). Raises BadImageError."""
    form, background = transform.form, transform.background
    image = decode(encoded, background) if form == RGB else decode_bands(encoded, form, background)
    with naming_lack_of_memory():
        return rows_of(transform.keep(image))


def rows_of(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) as (H, W, C): a crop is then a run of rows."""
    return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))


def estimated_bytes(source: Source, side: int, form: Form = RGB) -> int:
    """Bytes that the images of ``source`` take when they are kept, by a few of them.

    ``side``: their short side is at most so many pixels; 0: as they are.
    """
    areas = []
    for height, width in sizes_of_some(source, form):
        short = min(width, height)
        areas.append(width * height * min(1.0, (side or short) / short) ** 2)
    each = form.pixel_bytes * sum(areas) / max(len(areas), 1)
    return HEADER_BYTES + int(len(source) * (each + ROW_BYTES))


def sizes_of_some(source: Source, form: Form = RGB) -> Iterator[tuple[int, int]]:
    """Height and width in pixels of a few images, from all over the source."""
    numbers = probes(source)
    for number in numbers if form == RGB else numbers[:: -(-len(numbers) // DECODED_SPOTS)]:
        try:
            encoded = source.read(int(number))[0]
            # Headers of bands don't always say which sides are the image's.
            size = size_of(encoded)[::-1] if form == RGB else tensor_of(encoded, form).shape[1:]
        except (BadImageError, OSError):
            continue
        if min(size):
            yield tuple(size)


def key_of(source: Source, how: str, form: Form = RGB) -> bytes:
    """What the pixels follow from, and who reads them."""
    how += "" if form == RGB else f", {form}"
    user = os.getuid() if hasattr(os, "getuid") else 0
    versions = (torch.__version__, torchvision.__version__, PIL.__version__)
    terms = repr((VERSION, user, versions, how, len(source)))
    found = hashlib.blake2b(terms.encode(), digest_size=KEY_BYTES)
    if isinstance(source, FileSource):
        # Each file's size and time are compared when its image is read.
        found.update(os.fsencode(os.path.realpath(source.root)))
        found.update(source.paths.run(0, len(source.paths)))
        return found.digest()
    spots = np.unique(np.linspace(0, len(source) - 1, min(SPOTS, len(source))).astype(np.int64))
    for number in spots.tolist():
        found.update(os.fsencode(source.identity(number)) + b"\0")
    version = source.version()
    found.update(version.encode())
    for number in [] if version else spots[:: -(-len(spots) // DECODED_SPOTS)].tolist():
        try:
            found.update(tensor_of(source.read(number)[0], form).contiguous().numpy())
        except (BadImageError, OSError) as error:
            found.update(str(error).encode())
    return found.digest()
