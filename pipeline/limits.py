"""What a file may ask for before it is read as an image: its kind, bytes, pixels, memory, work."""

import errno
import os
import stat
from typing import BinaryIO

from PIL import Image

from bounded import open_at_once

MOST_FILE_BYTES = 1 << 30
BYTES_PER_PIXEL = 12  # of memory that decoding takes at most, for each pixel of the limit
MOST_SLOW_BYTES = 16 << 20  # of what Pillow reads byte by byte, at a second or more per MB
MOST_SCANS = 64  # of a JPEG; libjpeg's own script has 10, of four colours 18, mozjpeg's about 20

EMPTY = "an empty file: copy or download it again"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BadImageError(Exception):
    """An image that can't be decoded; the message is the reason."""


class TooLargeError(BadImageError):
    """An image of more pixels than the limit."""


def limit_pixels(most: int) -> None:
    """Have no image of more pixels read in this process (``--max-image-pixels``).

    Pillow's own limit is where the number is kept, so that all that Pillow does obeys it.
    """
    Image.MAX_IMAGE_PIXELS = most / 2  # Pillow warns of more than that, and refuses twice as many


def most_pixels() -> float:
    """How many pixels an image may have, so that a small file's can't fill the memory."""
    return 2 * (Image.MAX_IMAGE_PIXELS or float("inf"))


def too_many_pixels(what: str) -> TooLargeError:
    """``what`` names the image."""
    return TooLargeError(
        f"{what}: more than the limit of {most_pixels():,.0f} pixels, save it smaller or raise "
        "--max-image-pixels"
    )


def check_pixels(form: str, width: int, height: int, cost: float = BYTES_PER_PIXEL) -> None:
    """Raise TooLargeError for an image that is too large.

    Args:
        form: what kind of image it is, ``WebP image``.
        width, height: in pixels.
        cost: bytes of memory that decoding takes per pixel.
    """
    weight = max(1.0, cost / BYTES_PER_PIXEL)
    if width * height * weight > most_pixels():
        what = f"a {form} of {width:,}×{height:,} pixels"
        if weight > 1:
            what += f", each of which takes the memory of {weight:.1f}"
        raise too_many_pixels(what)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file that may be an image, open for reading.

    Raises:
        BadImageError: it is a pipe, a device, or anything but a file of at most MOST_FILE_BYTES.
        OSError: it can't be opened.
    """
    try:
        handle = open_at_once(path)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise BadImageError("a socket or device, not an image file") from None
        raise
    try:
        check_regular(os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(status: os.stat_result) -> None:
    """Raise BadImageError for what is no file of at most MOST_FILE_BYTES, by ``os.fstat``."""
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise BadImageError(f"{kind}, not an image file")
    if status.st_size > MOST_FILE_BYTES:
        raise BadImageError(
            f"a file of {status.st_size / 2**30:.1f} GiB: images have at most "
            f"{MOST_FILE_BYTES / 2**30:g} GiB"
        )
    if not status.st_size:
        # What the kernel makes up, as in /proc, has no size and may have no end.
        raise BadImageError(EMPTY)


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The content of a file as of :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read(os.fstat(file.fileno()).st_size)
