"""Images that aren't three colours of 8 bits: greys, bands, 16 bits; and how they are shown.

What a file holds becomes what the model takes by these rules: as many bands as the model has
channels stay as they are; of one and three channels, greys and colours become each other, and
transparent images are composited on the background. Everything else is an error.
"""

import io
import os
import warnings
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from augmentation.bands import composite
from augmentation.protocol import RGB, Form
from pipeline import decoding, headers
from pipeline.arrays import array_file, tiff_file
from pipeline.dicom import is_dicom, read_dicom
from pipeline.formats import FORMATS, open_image
from pipeline.levels import bands_last, in_depth, suited, with_axis
from pipeline.limits import BadImageError, check_regular, open_regular

_SAMPLES = 277  # TIFF's number of samples per pixel
_BITS = 258


def decode_bands(
    source: Any, form: Form, background: str = "white", formats: tuple[str, ...] = FORMATS
) -> torch.Tensor:
    """Any image as a model of another form than RGB takes it: uint8 or uint16 (C, H, W).

    8-bit levels become 16-bit ones times 257, and 16-bit ones the nearest of 8 bits.

    Args:
        source: as of :func:`pipeline.decoding.decode`; arrays may be uint16, and have any number
            of bands in their last axis.
        form: of the model.
        background: of transparent images where colours are asked for, as of ``decode``.
        formats: Pillow's names of those that are read.

    Raises BadImageError, also where the bands aren't those of the model, and OSError as ``decode``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with decoding.naming_lack_of_memory():
                pixels = _read(source, form, background, formats)
        except BadImageError:
            raise
        except Exception as error:
            raise decoding.bad_image(error) from None
    # A copy: what was read may be a view of a file's bytes.
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def tensor_of(source: Any, form: Form, background: str = "white") -> torch.Tensor:
    """Any image as a model of any form takes it: uint8 or uint16 (C, H, W).

    Raises as :func:`decode_bands`.
    """
    if form == RGB:
        return decoding.decode_tensor(source, background)
    return decode_bands(source, form, background)


def shown(source: Any, form: Form, background: str = "white") -> Image.Image:
    """An image as people look at it, RGB: itself, or what ``composite`` makes of its bands.

    Raises as :func:`decode_bands`.
    """
    if form == RGB:
        return decoding.decode(source, background)
    return composite(decode_bands(source, form, background).numpy())


# --- reading -------------------------------------------------------------------------------------


def _read(source: Any, form: Form, background: str, formats: tuple[str, ...]) -> np.ndarray:
    """uint8 or uint16 (H, W, C), as the model takes it."""
    if isinstance(source, np.ndarray):
        pixels = in_depth(with_axis(source), form.bit_depth)
        return suited(pixels, form.channels, background, alpha=pixels.shape[2] in (2, 4))
    if isinstance(source, str | os.PathLike):
        with open_regular(source) as file:
            return _read_file(file, form, background, formats)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_file(io.BytesIO(source), form, background, formats)
    if hasattr(source, "read"):
        if isinstance(source, io.BufferedReader | io.BufferedRandom | io.FileIO):
            check_regular(os.fstat(source.fileno()))
        return _read_file(source, form, background, formats)
    return _of_pillow(source, form, background, is_file=False)


def _read_file(file: BinaryIO, form: Form, background: str, formats: tuple[str, ...]) -> np.ndarray:
    if is_dicom(file):
        return suited(in_depth(with_axis(read_dicom(file)), form.bit_depth), form.channels)
    if (array := array_file(file)) is not None:
        return suited(in_depth(bands_last(array, form.channels), form.bit_depth), form.channels)
    file.seek(0)
    head = file.read(4)
    try:
        with open_image(file, formats) as image:
            if not _loses(image, form):
                return _of_pillow(image, form, background, is_file=True)
    except BadImageError:
        if head not in headers.TIFF or "TIFF" not in formats:
            raise
    if head not in headers.TIFF:
        raise BadImageError("16-bit grey with transparency: save it without, as PNG or TIFF")
    bands = bands_last(tiff_file(file), form.channels)
    return suited(in_depth(bands, form.bit_depth), form.channels)


def _loses(image: Image.Image, form: Form) -> bool:
    """Whether Pillow reads less of a file than there is and than is wanted."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        samples = int(tags.get(_SAMPLES, 1))
        deep = max(tags.get(_BITS, (1,))) > 8 and not decoding.is_deep(image)
        wanted = form.channels not in (1, 3)
        return (wanted and samples != len(image.getbands())) or (deep and form.bit_depth == 16)
    return form.bit_depth == 16 and image.mode == "LA" and _raw_mode(image).endswith(";16B")


def _raw_mode(image: Image.Image) -> str:
    """How the pixels of a PNG file are stored, by Pillow's name."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def has_more_levels(encoded: Any) -> bool:
    """Whether what ``Source.open`` gives has more than 256 levels, by its type or its header.

    False where that can't be told. DICOM is read by a window, whose levels are the user's choice.
    """
    if isinstance(encoded, np.ndarray):
        return encoded.dtype == np.uint16
    try:
        file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
        with open_image(file) as image:
            bits = max(getattr(image, "tag_v2", {}).get(_BITS, (1,)))
            return bits > 8 or decoding.is_deep(image) or _raw_mode(image).endswith(";16B")
    except Exception:  # Pillow raises almost anything; whoever reads the image says it
        return False


def _of_pillow(image: Any, form: Form, background: str, *, is_file: bool) -> np.ndarray:
    if form.bit_depth == 8 and form.channels in (1, 3):
        rgb = decoding.decode(image, background)
        return with_axis(np.asarray(rgb.convert("L") if form.channels == 1 else rgb))
    if not isinstance(image, Image.Image):
        raise BadImageError(f"{type(image).__name__} is none of path, bytes, file, image and array")
    deep = form.bit_depth == 16 and _raw_mode(image) in ("RGB;16B", "RGBA;16B")
    if deep and form.channels in (1, 3, 4):
        pixels = _both_bytes(image)
    elif decoding.is_deep(image):
        image.load()
        full = decoding.full_scale(image)
        pixels = np.rint(decoding.deep_values(image).clip(0) * (form.levels / full))
        pixels = with_axis(pixels.astype(np.uint16))
    else:
        decoding.keep_within_limit(image)
        image.load()
        if image.mode in ("P", "PA", "RGBa") or (image.mode == "RGB" and form.channels == 4):
            image = _with_its_palette(image, form.channels)
        pixels = np.asarray(image.convert("LA") if image.mode == "La" else image)
        pixels = with_axis(pixels.astype(np.uint8) * (255 if image.mode == "1" else 1))
    alpha = image.mode in ("LA", "RGBA", "La")
    pixels = suited(in_depth(pixels, form.bit_depth), form.channels, background, alpha=alpha)
    turn = decoding.turn_of(image, is_file=is_file)
    return pixels if turn is None else _turned(pixels, turn)


def _with_its_palette(image: Image.Image, channels: int) -> Image.Image:
    """The colours that numbers stand for; with transparency where there is any."""
    alpha = image.has_transparency_data and (channels == 4 or image.mode != "RGB")
    return image.convert("RGBA" if alpha else "RGB")


def _both_bytes(image: Image.Image) -> np.ndarray:
    """All 16 bits of a PNG file of colours, of which Pillow keeps the high bytes.

    Read as if it had the low byte first, what is kept are the low bytes.
    """
    tile, file = image.tile, image.fp
    image.load()
    high = np.asarray(image).astype(np.uint16)
    file.seek(0)
    with Image.open(file, formats=("PNG",)) as again:
        place = again.tile[0]
        again.tile = [type(place)(place[0], place[1], place[2], tile[0][3].replace(";16B", ";16L"))]
        again.load()
        return high << 8 | np.asarray(again)


def _turned(pixels: np.ndarray, turn: Image.Transpose) -> np.ndarray:
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in pixels.transpose(2, 0, 1)]
    return np.stack([np.asarray(band.transpose(turn)) for band in bands], axis=2)
