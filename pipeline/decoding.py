"""Reading one image: any file, array or Pillow image as RGB."""

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff")
    + (".webp", ".avif", ".jp2")
)


class BadImageError(Exception):
    """An image that can't be decoded; the message is the reason."""


def decode(source: Any) -> Image.Image:
    """A path, binary file, PIL image or uint8 array (H, W) or (H, W, 3) as an RGB image.

    Turned upright by its EXIF data; 16-bit, 32-bit and float greys are scaled to 8 bits,
    transparency is dropped. Raises BadImageError.
    """
    # Pillow's plug-ins raise almost anything on a damaged file, and warn of what is still readable.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(source, np.ndarray):
                return Image.fromarray(source).convert("RGB")
            if isinstance(source, Image.Image):
                return _to_rgb(source)
            with Image.open(source) as image:
                image.load()
                return _to_rgb(_upright(image))
        except UnidentifiedImageError:
            raise BadImageError("not an image that Pillow can read") from None
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BadImageError(reason) from None


JPEG = b"\xff\xd8\xff"


def decode_tensor(image: Any) -> torch.Tensor:
    """As ``decode``, to uint8 (3, H, W); JPEG files take a shorter way to the same pixels.

    Raises BadImageError.
    """
    if isinstance(image, str | Path | io.BytesIO):
        content = image.getvalue() if isinstance(image, io.BytesIO) else _file_content(image)
        tensor = _decode_jpeg(content) if content.startswith(JPEG) else None
        if tensor is not None:
            return tensor
        image = io.BytesIO(content)
    return _channels_first(np.array(decode(image)))


def _file_content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from None


def _decode_jpeg(content: bytes) -> torch.Tensor | None:
    """uint8 (3, H, W), or None where Pillow had better look at it (damaged, CMYK)."""
    with warnings.catch_warnings():
        # That it will move to another package, and that bytes can't be written to.
        warnings.simplefilter("ignore")
        encoded = torch.frombuffer(content, dtype=torch.uint8)
        try:
            image = decode_jpeg(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
        except RuntimeError:
            return None
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    return image if image.shape[0] == 3 else None


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as (3, H, W), in the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    # Broken EXIF data is no reason to lose an image whose pixels are fine.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _to_8bit(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, scaled by the full range that mode and values suggest."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = values.max()
    ranges = (65535,) if image.mode.startswith("I;16") else (255, 65535)
    if image.mode == "F":
        ranges = (1, *ranges)
    full = next((r for r in ranges if peak <= r), peak)
    return Image.fromarray(np.rint(values.clip(0) * (255 / full)).astype(np.uint8))


# By ``Transform.decode_as``.
DECODERS: dict[str, Callable[[Any], Any]] = {"PIL": decode, "tensor": decode_tensor}
