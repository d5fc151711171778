"""Bytes of strangers to pictures: what is too large is refused before it is decoded."""

import io
from collections.abc import Callable

from PIL import Image
from torch import Tensor

import datasets

Image.init()
# Of these the header tells the size that is decoded. AVIF came late to Pillow.
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
    if name in Image.OPEN
]


class RefusedError(Exception):
    """A request or picture that gets no answer: HTTP status and what to tell the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def decoded(content: bytes, transform: Callable[[Image.Image], Tensor], max_pixels: int) -> Tensor:
    """A picture file as the model takes it, (3, H, W).

    Raises RefusedError: 413 for more than ``max_pixels``, 422 for what is no whole picture.
    """
    check(content, max_pixels)
    try:
        return transform(datasets.decode(io.BytesIO(content)))
    except datasets.BadPictureError:
        raise RefusedError(422, "the picture is damaged") from None


def check(content: bytes, max_pixels: int) -> None:
    """Look at the header alone. Raises RefusedError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise RefusedError(413, f"the picture has more than {max_pixels:,} pixels") from None
    except Exception:  # Pillow's plug-ins raise almost anything on a damaged header
        raise RefusedError(422, "not a picture: send JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    if width * height > max_pixels:
        raise RefusedError(
            413, f"the picture has {width}×{height} pixels, more than {max_pixels:,}"
        )
