"""Numbers of a file as the levels of an image, in as many bands as a model has channels."""

from typing import BinaryIO

import numpy as np
from PIL import Image

from config import DROP, background_colour
from pipeline.arrays import ArrayFile, array_file, tiff_file
from pipeline.dicom import is_dicom, read_dicom
from pipeline.limits import BadImageError

_LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R 601-2, as Pillow's mode L


def image_of_array(file: BinaryIO) -> Image.Image | None:
    """An NPY, NPZ or DICOM file as Pillow's image, L or RGB; None for any other file.

    Raises BadImageError, also for other numbers of bands than one and three.
    """
    if is_dicom(file):
        return _as_pillow(read_dicom(file))
    if (array := array_file(file)) is not None:
        return _as_pillow(bands_last(array, 3))
    return None


def image_of_tiff(file: BinaryIO) -> Image.Image:
    """A TIFF file that Pillow has no mode for as its image, as of :func:`image_of_array`."""
    return _as_pillow(bands_last(tiff_file(file), 3))


def as_colours(pixels: np.ndarray) -> np.ndarray:
    """An array (H, W) or (H, W, C) as uint8 (H, W, 3). Raises BadImageError."""
    return suited(in_depth(with_axis(pixels), 8), 3)


def _as_pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(as_colours(pixels)))


# --- numbers to levels ---------------------------------------------------------------------------


def with_axis(pixels: np.ndarray) -> np.ndarray:
    """(H, W) as (H, W, 1)."""
    return pixels[..., None] if pixels.ndim == 2 else pixels


def bands_last(array: ArrayFile, channels: int) -> np.ndarray:
    """The numbers as (H, W, C). Raises BadImageError where it isn't clear which axis is C.

    Bands are in the axis that has as many entries as the model has channels, or may have; both the
    first and the last can't.
    """
    if len(array.shape) == 2:
        return array.read()[..., None]
    given = "×".join(map(str, array.shape))
    if array.axes:
        first, last = array.axes == "first", array.axes == "last"
    else:
        counts = (1, 3) if channels in (1, 3) else (channels,)
        first, last = (array.shape[axis] in counts for axis in (0, -1))
    if first and last:
        raise BadImageError(
            f"{array.form} of {given}: bands may be first or last, save another height or width"
        )
    if not (first or last):
        raise BadImageError(
            f"{array.form} of {given}: the model takes H×W×{channels} or {channels}×H×W, as "
            "--in-chans says"
        )
    pixels = array.read()
    return pixels.transpose(1, 2, 0) if first else pixels


def in_depth(pixels: np.ndarray, bit_depth: int) -> np.ndarray:
    """Numbers as levels of 8 or 16 bits. Raises BadImageError for those that are none.

    Floats are in 0-1.
    """
    levels = 2**bit_depth - 1
    kind = np.uint8 if bit_depth == 8 else np.uint16
    if pixels.dtype == np.bool_:
        return pixels.astype(kind) * kind(levels)
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:  # NaN included
            raise BadImageError(
                f"floats from {low:g} to {high:g}: scale them to 0-1, or save uint16"
            )
        return np.rint(pixels.astype(np.float64) * levels).astype(kind)
    if pixels.dtype.kind == "i" and pixels.min() < 0:
        raise BadImageError(f"numbers from {pixels.min()}: shift them to 0-65535, save uint16")
    if pixels.dtype == np.uint8:
        return pixels if bit_depth == 8 else pixels.astype(np.uint16) * np.uint16(257)
    pixels = pixels.astype(np.uint16)
    return pixels if bit_depth == 16 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def suited(
    pixels: np.ndarray, channels: int, background: str = DROP, *, alpha: bool = False
) -> np.ndarray:
    """(H, W, C) levels as (H, W, ``channels``). Raises BadImageError where they aren't that.

    ``alpha``: the last band says how opaque a pixel is.
    """
    bands = pixels.shape[2]
    if bands == channels:
        return pixels
    if alpha and channels in (1, 3):
        pixels = _composited(pixels, background)
    if channels == 3 and pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if channels == 1 and pixels.shape[2] == 3:
        return np.rint(pixels @ _LUMA).astype(pixels.dtype)[..., None]
    if pixels.shape[2] == channels:
        return pixels
    raise BadImageError(
        f"{bands} band{'' if bands == 1 else 's'}, not the {channels} that the model takes: see "
        "--in-chans"
    )


def _composited(pixels: np.ndarray, background: str) -> np.ndarray:
    """Colours on the background, without their alpha."""
    colours, opaque = pixels[..., :-1], pixels[..., -1:]
    colour = background_colour(background)
    if colour is None:
        return colours
    full = np.iinfo(pixels.dtype).max
    ground = np.array(colour, dtype=np.float64) * (full / 255)
    if colours.shape[2] == 1:
        ground = ground @ _LUMA
    share = opaque / full
    return np.rint(colours * share + ground * (1 - share)).astype(pixels.dtype)
