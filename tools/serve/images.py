"""Bytes of strangers to images: what is too large is refused before it is decoded."""

import io

from torch import Tensor

from augmentation.protocol import RGB
from inference import ImageTransform
from pipeline.bands import decode_bands
from pipeline.formats import SERVED, open_image
from pipeline.limits import BadImageError, TooLargeError, limit_pixels
from tools.serve.schema import TAKEN

_SEND = f"send {TAKEN}"


class RefusedError(Exception):
    """A request or image that gets no answer: HTTP status and a message for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def decoded(content: bytes, transform: ImageTransform, max_pixels: int) -> Tensor:
    """An image file as the model takes it, (C, H, W).

    Raises RefusedError: 413 for more than ``max_pixels``, 422 for what is no whole image. No image
    of more pixels is read in this process any more, whatever it is asked.
    """
    limit_pixels(max_pixels)
    try:
        if transform.form == RGB:
            check(content, max_pixels)
            return transform(content)
        # What the header says is checked while it is decoded; other forms have fewer formats.
        bands = decode_bands(content, transform.form, transform.background, SERVED)
        return transform.apply(bands, 0, 0)
    except TooLargeError as error:
        # What comes after is for those who may set options.
        raise RefusedError(413, str(error).partition(", save it")[0]) from None
    except BadImageError as error:
        raise RefusedError(422, f"the image can't be read: {error}") from None


def check(content: bytes, max_pixels: int) -> None:
    """Look at the header alone. Raises RefusedError, TooLargeError."""
    try:
        with open_image(io.BytesIO(content), SERVED) as image:
            width, height = image.size
    except TooLargeError:
        raise
    except BadImageError as error:
        raise RefusedError(422, f"not an image that is read: {error} ({_SEND})") from None
    except Exception:  # Pillow's plug-ins raise almost anything on a damaged header
        raise RefusedError(422, f"not an image: {_SEND}") from None
    if width * height > max_pixels:
        raise RefusedError(413, f"the image has {width}×{height} pixels, more than {max_pixels:,}")
