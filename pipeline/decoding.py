"""Reading one image: any file, array or Pillow image as RGB."""

import contextlib
import errno
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms
from PIL.ExifTags import Base as Tag
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.MpoImagePlugin import MpoImageFile

from architectures.sizes import ImageSize
from augmentation.protocol import Box, Cut, Parts
from config import DROP, background_colour
from errors import lacks_host_memory, os_error_text
from pipeline import jpeg, levels
from pipeline.formats import FORMATS, open_image
from pipeline.headers import JPEG, Frame, check_exif, check_jpeg
from pipeline.limits import (
    BadImageError,
    check_regular,
    most_pixels,
    open_regular,
    too_many_pixels,
)

# By the number that EXIF has for how the camera was held.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 1 << 20  # pixels that are converted at a time


def decode(source: Any, background: str = "white") -> Image.Image:
    """Any image as an RGB image, turned upright by its EXIF data.

    16-bit, 32-bit and float greys are scaled to 8 bits. A JPEG file of more pixels than the limit
    (``pipeline.limits``) is read at a half, a quarter or an eighth of its sides. The memory that
    this takes is bounded: the size of the file and BYTES_PER_PIXEL for each pixel of the limit.

    Args:
        source: a path, bytes, a binary file, a Pillow image of any mode, which stays as it is, or
            an array (H, W), (H, W, 1), (H, W, 3) or, of uint8, (H, W, 4).
        background: a colour by name or as #rrggbb, on which what is transparent is composited, or
            "drop": the colours under it are taken as they are.

    Raises:
        BadImageError: it can't be read, or not in the memory that there is.
        OSError: this process or machine has too many files open.
    """
    # Pillow's plug-ins raise almost anything on a damaged file, and warn of what is still readable.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with naming_lack_of_memory(), _opened(source) as image:
                keep_within_limit(image)
                image.load()
                rgb = _to_rgb(image, background)
                return _upright(image, rgb, is_file=image is not source)
        except BadImageError:
            raise
        except Exception as error:
            raise bad_image(error) from None


def bad_image(error: Exception) -> Exception:
    """What to raise for an error while an image is read; one of the process stays as it is."""
    return error if lacks_file_handles(error) else BadImageError(_reason(error))


def lacks_file_handles(error: Exception) -> bool:
    """Whether a file can't be opened because too many are, which is no fault of the image."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return os_error_text(OSError(*error.args))  # whoever reads the message knows the path
    return str(error) or type(error).__name__


@contextlib.contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Raise BadImageError where an image needs more memory than there is, or than is allowed."""
    try:
        yield
    except Image.DecompressionBombError:  # a part of it that was enlarged
        raise too_many_pixels("what is shown of the image") from None
    except MemoryError:
        raise BadImageError("needs more memory than there is") from None
    except RuntimeError as error:
        if not lacks_host_memory(error):
            raise
        raise BadImageError("needs more memory than there is") from None


def is_transparent(source: Any) -> bool:
    """Whether any pixel of an image, as of ``decode``, is transparent. Raises BadImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with naming_lack_of_memory(), _opened(source) as image:
                if not image.has_transparency_data:
                    return False
                keep_within_limit(image)
                image.load()
                alphas = (_alpha(strip) for _, strip in _strips(image))
                return any(a is not None and a.getextrema()[0] < 255 for a in alphas)
        except BadImageError:
            raise
        except Exception as error:
            raise bad_image(error) from None


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The image of what ``decode`` takes; a file that is opened here is closed again."""
    if isinstance(source, Image.Image):
        _refuse_other_formats(source)
        yield source
    elif isinstance(source, np.ndarray):
        bands = source.shape[2] if source.ndim == 3 else 1
        if bands > 4 or (bands > 1 and source.dtype == np.uint16):  # Pillow has no mode for them
            source = levels.as_colours(source)
        yield Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
    elif isinstance(source, bytes | bytearray | memoryview):
        with open_image(io.BytesIO(source)) as image:
            yield image
    elif isinstance(source, str | os.PathLike) or hasattr(source, "read"):
        with open_image(source) as image:
            yield image
    else:
        kind = type(source).__name__
        raise BadImageError(f"{kind} is none of path, bytes, binary file, Pillow image and array")


def _refuse_other_formats(image: Image.Image) -> None:
    """Raise BadImageError for a file that somebody else opened, and that loading would decode."""
    form = image.format if isinstance(image, ImageFile) and image.tile else None
    if form is not None and form not in (*FORMATS, MpoImageFile.format):
        raise BadImageError(f"{form} files are not read: convert it to PNG or JPEG")


def keep_within_limit(image: Image.Image) -> None:
    """Have a large JPEG file decoded at a part of its size. Raises BadImageError."""
    width, height = image.size
    if width * height <= most_pixels() or not isinstance(image, JpegImageFile):
        return  # others are refused when they are opened
    parts = () if image.info.get("progressive") else (2, 4, 8)
    for part in parts:
        # Once: what is drafted again is not what is said then.
        if -(-width // part) * -(-height // part) <= most_pixels():
            image.draft(None, (max(1, width // part), max(1, height // part)))
            break
    if image.size[0] * image.size[1] > most_pixels():
        raise too_many_pixels(f"a JPEG of {width:,}×{height:,} pixels")


def decode_tensor(
    image: Any, background: str = "white", short_side: int | None = None
) -> torch.Tensor:
    """As ``decode``, to uint8 (3, H, W); JPEG files take a shorter way to the same pixels.

    Args:
        image, background: as of ``decode``.
        short_side: at least so many pixels of the short side are needed: a JPEG file may come at
            a half, a quarter or an eighth of its sides (rounded up), which takes less time.

    Raises BadImageError, and OSError as ``decode`` does.
    """
    opened = open_parts(image, background)
    with naming_lack_of_memory():
        return opened.whole(short_side).pixels if isinstance(opened, Parts) else opened


def open_parts(image: Any, background: str = "white", form: str = "tensor") -> Any:
    """An image of which parts can be had: ``JpegParts``, or one that is decoded already.

    Args:
        image, background: as of ``decode``.
        form: of ``DECODERS``, how images that are no ordinary JPEG files are decoded.

    Raises BadImageError, and OSError as ``decode`` does.
    """
    if form == "tensor" and _is_rgb_array(image):
        return torch.from_numpy(image).permute(2, 0, 1)
    with naming_lack_of_memory():
        try:
            if isinstance(image, str | os.PathLike):
                with open_regular(image) as file:
                    return _parts_of(file, background, form)
            if isinstance(image, io.BufferedReader):  # as the package of Hugging Face opens files
                check_regular(os.fstat(image.fileno()))
            if isinstance(image, io.BufferedReader | io.BytesIO):
                return _parts_of(image, background, form)
        except OSError as error:
            raise bad_image(error) from None
        return _in_form(decode(image, background), form)


def _is_rgb_array(image: Any) -> bool:
    """Whether it is an array that torch takes as it is."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        return False
    return image.ndim == 3 and image.shape[2] == 3 and image.flags.writeable


def _parts_of(file: BinaryIO, background: str, form: str) -> Any:
    """``open_parts`` of a file."""
    file.seek(0)
    if file.read(len(JPEG)) == JPEG:
        file.seek(0)
        content = file.read()
        frame = check_jpeg(content)
        if frame is not None and 0 < frame.width * frame.height <= most_pixels():
            return JpegParts(content, frame, background)
        file = io.BytesIO(content)
    return _in_form(decode(file, background), form)


def _in_form(image: Image.Image, form: str) -> Any:
    return image if form == "PIL" else _channels_first(image)


class JpegParts(Parts):
    """Parts of a JPEG file with an ordinary header; nothing is decoded before one is asked for."""

    def __init__(self, content: bytes, frame: Frame, background: str) -> None:
        self.content = content
        self.frame = frame
        self.background = background
        sides = (frame.height, frame.width)
        self.size = sides[::-1] if frame.turn >= 5 else sides

    def part(self, box: Box, least: ImageSize | None = None) -> Cut:
        """See ``Parts``. Raises BadImageError."""
        turn = self.frame.turn
        factor = 1 if least is None else jpeg.factor_for(*box[2:], least)
        top, left, height, width = (x / factor for x in jpeg.as_stored(box, *self.size, turn))
        rows = slice(int(top), math.ceil(top + height))
        columns = slice(int(left), math.ceil(left + width))
        pixels = jpeg.decode(self.content, self.frame, factor, rows.stop)
        if pixels is None:
            return Parts(_channels_first(decode(self.content, self.background))).part(box)
        cut = np.ascontiguousarray(jpeg.upright(pixels[rows, columns], turn))
        inner = None
        if factor > 1:
            place = top - rows.start, left - columns.start, height, width
            top, left, height, width = jpeg.as_upright(place, *cut.shape[:2], turn)
            inner = left, top, left + width, top + height
        return Cut(torch.from_numpy(cut).permute(2, 0, 1), inner)


def _channels_first(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W), in the memory of one (H, W, 3) array."""
    width, height = image.size
    if width * height <= _STRIP:
        pixels = np.array(image)
    else:
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for top, strip in _strips(image):
            pixels[top : top + strip.height] = strip
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in strips of at most ``_STRIP`` pixels, each with its first row.

    What is done pixel by pixel then takes little memory beside the image and its result.
    """
    width, height = image.size
    rows = max(1, _STRIP // max(1, width))
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _upright(image: Image.Image, rgb: Image.Image, *, is_file: bool) -> Image.Image:
    """``rgb``, the pixels of ``image``, turned as its EXIF data say."""
    turn = turn_of(image, is_file=is_file)
    if turn is None:
        return rgb
    rgb = rgb.transpose(turn)
    rgb.info = {}  # or it would be turned once more
    return rgb


def turn_of(image: Image.Image, *, is_file: bool) -> Image.Transpose | None:
    """How an image's EXIF data say that it is to be turned.

    Args:
        is_file: nobody has changed them since the file was opened.
    """
    # Broken EXIF data is no reason to lose an image whose pixels are fine.
    with contextlib.suppress(Exception):
        return _TURNS.get(_orientation(image, is_file=is_file))
    return None


def _orientation(image: Image.Image, *, is_file: bool) -> int | None:
    """What EXIF data say. Raises BadImageError for those that fill the memory when they are read.

    Args:
        is_file: nobody has changed them since the file was opened.
    """
    exif, raw = image.info.get("exif"), image.info.get("Raw profile type exif")
    if exif is None and raw is not None:
        exif = bytes.fromhex("".join(raw.split("\n")[3:]))  # as ImageMagick writes it in PNG
    found = None if exif is None else check_exif(exif)
    # Pillow's own reading takes as long as a tenth of the decoding.
    return found if found and is_file else image.getexif().get(Tag.Orientation)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """RGB on ``background``; ``image`` itself where it is that already."""
    full = full_scale(image) if is_deep(image) else 0.0
    width, height = image.size
    if width * height <= _STRIP or (image.mode == "RGB" and not image.has_transparency_data):
        return _strip_to_rgb(image, background, full)
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(_strip_to_rgb(strip, background, full), (0, top))
    return rgb


def _strip_to_rgb(image: Image.Image, background: str, full: float) -> Image.Image:
    rgb = _without_alpha(image, full)
    if not image.has_transparency_data or background == DROP:
        return rgb
    alpha = _alpha(image)
    if alpha is None:
        return rgb
    flat = Image.new("RGB", rgb.size, background_colour(background))
    flat.paste(rgb, mask=alpha)
    return flat


def _without_alpha(image: Image.Image, full: float) -> Image.Image:
    """RGB, the colours under what is transparent as they are; ``full`` is white in deep greys."""
    mode = image.mode
    if is_deep(image):
        values = np.rint(deep_values(image).clip(0) * (255 / full)).astype(np.uint8)
        return Image.fromarray(values).convert("RGB")
    if mode == "LAB":
        space, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, space, srgb, outputMode="RGB")
    if mode in ("La", "RGBa"):  # multiplied by alpha
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, "L"; None where nothing says so."""
    if is_deep(image):
        key = image.info.get("transparency")
        if not isinstance(key, int):
            return None
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA").getchannel("A")


def is_deep(image: Image.Image) -> bool:
    """Whether it has greys of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def deep_values(image: Image.Image) -> np.ndarray:
    """Deep greys as numbers, (H, W) float64."""
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def full_scale(image: Image.Image) -> float:
    """What is white in an image of deep greys: the full range that mode and values suggest."""
    peak = max(deep_values(strip).max() for _, strip in _strips(image))
    ranges = (65535,) if image.mode.startswith("I;16") else (255, 65535)
    if image.mode == "F":
        ranges = (1, *ranges)
    return next((r for r in ranges if peak <= r), peak)


# By ``Transform.decode_as``.
DECODERS: dict[str, Callable[[Any, str], Any]] = {"PIL": decode, "tensor": decode_tensor}
