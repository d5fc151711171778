"""Bytes of strangers to images: what is too large is refused before it is decoded."""

import io

from PIL import Image
from torch import Tensor

from inference import ImageTransform
from pipeline.decoding import BadImageError, most_pixels, open_image

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


def decoded(content: bytes, transform: ImageTransform, max_pixels: int) -> Tensor:
    """An image file as the model takes it, (3, H, W).

    Raises RefusedError: 413 for more than ``max_pixels``, 422 for what is no whole image.
    """
    check(content, max_pixels)
    try:
        return transform(content)
    except BadImageError as error:
        raise RefusedError(422, f"the image can't be read: {error}") from None


def check(content: bytes, max_pixels: int) -> None:
    """Look at the header alone. Raises RefusedError."""
    try:
        with open_image(io.BytesIO(content), FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        most = min(max_pixels, int(most_pixels()))
        raise RefusedError(413, f"the image has more than {most:,} pixels") from None
    except Exception:  # Pillow's plug-ins raise almost anything on a damaged header
        raise RefusedError(422, "not an image: send JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    if width * height > max_pixels:
        raise RefusedError(413, f"the image has {width}×{height} pixels, more than {max_pixels:,}")
