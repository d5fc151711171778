"""JPEG files: decoded at a part of their size, and no further down than what is wanted.

simplejpeg (libjpeg-turbo) decodes to one array (H, W, 3). Where it isn't installed, Pillow does the
same work with the same library, to the same pixels, and more slowly.
"""

import io

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from architectures.sizes import ImageSize, height_width
from pipeline.headers import Frame

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

FACTORS = (8, 4, 2)  # the DCT gives these parts of the sides for less work than the whole
Place = tuple[float, float, float, float]
"""Top, left, height and width of a part of an image, in pixels."""

_END = b"\xff\xd9"
_BELOW = 4  # rows that the last wanted one may be made from: colours are interpolated
HINT = "pip install simplejpeg: faster, to the same pixels"


def is_fast() -> bool:
    """Whether the fast decoder is installed; without it ``HINT`` helps."""
    return simplejpeg is not None


def factor_for(height: int, width: int, least: ImageSize) -> int:
    """The part of its sides, one over this, that leaves both sides at least ``least`` pixels, or
    height and width each theirs."""
    rows, columns = height_width(least)
    return next((f for f in FACTORS if height >= f * rows and width >= f * columns), 1)


def decode(
    content: bytes, frame: Frame, factor: int = 1, rows: int | None = None
) -> np.ndarray | None:
    """uint8 (H, W, 3) as the file has it, which is not turned upright.

    Args:
        content: the file.
        frame: of :func:`pipeline.headers.check_jpeg`.
        factor: 1, 2, 4 or 8: the sides are divided by it and rounded up.
        rows: how many of the result are wanted; more may come, and those beyond are not the
            image's.

    Returns:
        None for what Pillow had better look at: damaged, of four colours, odd.
    """
    if frame.components not in (1, 3):
        return None
    if simplejpeg is None:
        return None if factor == 1 else _by_pillow(content, frame, factor)
    height = frame.height
    if rows is not None and frame.at_once and content.rfind(_END) > frame.scan_at:
        # A file that is cut short must be found out whatever part of it is wanted.
        height = min(height, (rows + _BELOW) * factor)
    cut = height < frame.height
    if cut:
        # The decoder stops there; what is left is neither decoded nor missed.
        content = bytearray(content)
        content[frame.height_at : frame.height_at + 2] = height.to_bytes(2)
    size = -(-height // factor), -(-frame.width // factor)
    try:
        pixels = simplejpeg.decode_jpeg(
            content, min_height=size[0], min_width=size[1], strict=not cut
        )
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == size else None


def _by_pillow(content: bytes, frame: Frame, factor: int) -> np.ndarray | None:
    size = -(-frame.height // factor), -(-frame.width // factor)
    try:
        image = JpegImageFile(io.BytesIO(content))
        image.draft(None, (frame.width // factor, frame.height // factor))
        pixels = np.array(image.convert("RGB"))
    except Exception:  # Pillow raises almost anything; its full decoding says what is wrong
        return None
    return pixels if pixels.shape[:2] == size else None


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, 3) turned as EXIF's orientation ``turn`` says; a view. 0 and 1 leave it as it is."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = _MIRRORED.get(turn, (1, 1))
    return pixels[::rows, ::columns]


def as_stored(box: Place, height: int, width: int, turn: int) -> Place:
    """Where a part of an upright image of ``height`` × ``width`` pixels lies in the file.

    ``turn`` is EXIF's orientation.
    """
    top, left, rows, columns = _mirrored(box, height, width, turn)
    return (left, top, columns, rows) if turn >= 5 else (top, left, rows, columns)


def as_upright(box: Place, height: int, width: int, turn: int) -> Place:
    """The inverse of :func:`as_stored`."""
    top, left, rows, columns = box
    box = (left, top, columns, rows) if turn >= 5 else box
    return _mirrored(box, height, width, turn)


def _mirrored(box: Place, height: int, width: int, turn: int) -> Place:
    top, left, rows, columns = box
    vertical, horizontal = _MIRRORED.get(turn, (1, 1))
    return (
        top if vertical > 0 else height - top - rows,
        left if horizontal > 0 else width - left - columns,
        rows,
        columns,
    )


# By orientation, after rows and columns have changed places from 5 on: −1 for what is mirrored,
# rows and columns (CIPA DC-008, 4.6.5.1.5).
_MIRRORED = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
