"""A decoder that fails on some sizes of images, in the processes of the service."""

import ctypes
import io
import time

from PIL import Image

from tools.serve import images

HANGS, CRASHES, FAILS, GREEDY, NAPS = ((9, height) for height in (3, 4, 5, 6, 7))
decoded_by_service = images.decoded


def decoded(content, transform, max_pixels):
    """In the place of ``tools.serve.images.decoded``."""
    size = Image.open(io.BytesIO(content)).size
    if size == HANGS:
        time.sleep(1000)
    elif size == NAPS:
        time.sleep(0.4)
    elif size == CRASHES:
        ctypes.string_at(0)
    elif size == FAILS:
        raise RuntimeError("secret of the inside")
    elif size == GREEDY:
        bytes(2**40)
    return decoded_by_service(content, transform, max_pixels)
