"""Bytes of strangers to images: what is too large is refused before it is decoded."""

import io
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from pipeline.decoding import BadImageError, decode

Image.init()
# Of these the header tells the size that is decoded. AVIF came late to Pillow.
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
    if name in Image.OPEN
]


class RefusedError(Exception):
    """A request or image that gets no answer: HTTP status and a message for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def decoded(content: bytes, transform: Callable[[Image.Image], Tensor], max_pixels: int) -> Tensor:
    """An image file as the model takes it, (3, H, W).

    Raises RefusedError: 413 for more than ``max_pixels``, 422 for what is no whole image.
    """
    check(content, max_pixels)
    try:
        return transform(decode(io.BytesIO(content)))
    except BadImageError:
        raise RefusedError(422, "the image is damaged") from None


def check(content: bytes, max_pixels: int) -> None:
    """Look at the header alone. Raises RefusedError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise RefusedError(413, f"the image has more than {max_pixels:,} pixels") from None
    except Exception:  # Pillow's plug-ins raise almost anything on a damaged header
        raise RefusedError(422, "not an image: send JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    if width * height > max_pixels:
        raise RefusedError(413, f"the image has {width}×{height} pixels, more than {max_pixels:,}")
