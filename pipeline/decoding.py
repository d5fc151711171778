"""Reading one image: any file, array or Pillow image as RGB."""

import contextlib
import errno
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.io import ImageReadMode, decode_jpeg

from config import DROP, background_colour
from errors import lacks_host_memory, os_error_text
from pipeline.formats import what_it_is

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


class BadImageError(Exception):
    """An image that can't be decoded; the message is the reason."""


def decode(source: Any, background: str = "white") -> Image.Image:
    """Any image as an RGB image, turned upright by its EXIF data.

    16-bit, 32-bit and float greys are scaled to 8 bits. A JPEG file of more pixels than Pillow's
    limit is read at a half, a quarter or an eighth of its sides.

    Args:
        source: a path, bytes, a binary file, a Pillow image of any mode, which stays as it is, or a
            uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
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
                _keep_within_limit(image)
                image.load()
                return _upright(image, _to_rgb(image, background))
        except BadImageError:
            raise
        except UnidentifiedImageError:
            raise BadImageError(what_it_is(source)) from None
        except Exception as error:
            raise _bad_image(error) from None


def _bad_image(error: Exception) -> Exception:
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
    """Raise BadImageError where an image needs more memory than there is."""
    try:
        yield
    except MemoryError:
        raise BadImageError("needs more memory than there is") from None
    except RuntimeError as error:
        if not lacks_host_memory(error):
            raise
        raise BadImageError("needs more memory than there is") from None


def open_image(source: Any, formats: Sequence[str] | None = None) -> Image.Image:
    """``Image.open``, also of a JPEG file above Pillow's limit: that is read at a part of its size.

    The header alone is read. Raises what ``Image.open`` raises.
    """
    try:
        return Image.open(source, formats=formats)
    except Image.DecompressionBombError:
        if not isinstance(source, str | os.PathLike):
            source.seek(0)
        with contextlib.suppress(SyntaxError):  # of another format
            return JpegImageFile(source)
        raise


def is_transparent(source: Any) -> bool:
    """Whether any pixel of an image, as of ``decode``, is transparent. Raises BadImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with naming_lack_of_memory(), _opened(source) as image:
                if not image.has_transparency_data:
                    return False
                alpha = _alpha(image)
                return alpha is not None and alpha.getextrema()[0] < 255
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError(_reason(error)) from None


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The image of what ``decode`` takes; a file that is opened here is closed again."""
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, np.ndarray):
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


def most_pixels() -> float:
    """What Pillow refuses to read, so as not to fill the memory with a small file's pixels."""
    return 2 * (Image.MAX_IMAGE_PIXELS or float("inf"))


def _keep_within_limit(image: Image.Image) -> None:
    """Have a large JPEG file decoded at a part of its size. Raises BadImageError."""
    width, height = image.size
    if width * height <= most_pixels() or not isinstance(image, JpegImageFile):
        return  # others are refused when they are opened
    if image.info.get("progressive"):
        raise BadImageError(
            f"a progressive JPEG of {width}×{height} pixels must be read whole, which is more than "
            f"the limit of {most_pixels():,}: save it smaller, or not as a progressive one"
        )
    for part in (2, 4, 8):
        image.draft(None, (width // part, height // part))
        if image.size[0] * image.size[1] <= most_pixels():
            return


JPEG = b"\xff\xd8\xff"


def decode_tensor(image: Any, background: str = "white") -> torch.Tensor:
    """As ``decode``, to uint8 (3, H, W); JPEG files take a shorter way to the same pixels.

    Raises BadImageError.
    """
    with naming_lack_of_memory():
        if isinstance(image, str | Path | io.BytesIO):
            content = image.getvalue() if isinstance(image, io.BytesIO) else _file_content(image)
            tensor = _decode_jpeg(content) if content.startswith(JPEG) else None
            if tensor is not None:
                return tensor
            image = io.BytesIO(content)
        return _channels_first(np.array(decode(image, background)))


def _file_content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _bad_image(error) from None


def _decode_jpeg(content: bytes) -> torch.Tensor | None:
    """uint8 (3, H, W), or None where Pillow had better look at it (damaged, CMYK, huge)."""
    if not 0 < _jpeg_pixels(content) <= most_pixels():
        return None
    with warnings.catch_warnings():
        # That it will move to another package, and that bytes can't be written to.
        warnings.simplefilter("ignore")
        encoded = torch.frombuffer(content, dtype=torch.uint8)
        try:
            image = decode_jpeg(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
        except RuntimeError:
            return None
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    return image if image.shape[0] == 3 else None


def _jpeg_pixels(content: bytes) -> int:
    """How many a JPEG file has by its frame header (ITU-T T.81, B.2.2); 0 where none is found."""
    place = 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # a byte that fills
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, place + 5)
            return height * width
        else:
            place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    return 0


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as (3, H, W), in the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb``, the pixels of ``image``, turned as its EXIF data say."""
    turn = None
    # Broken EXIF data is no reason to lose an image whose pixels are fine.
    with contextlib.suppress(Exception):
        turn = _TURNS.get(image.getexif().get(Tag.Orientation))
    if turn is None:
        return rgb
    rgb = rgb.transpose(turn)
    rgb.info = {}  # or it would be turned once more
    return rgb


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """RGB on ``background``; ``image`` itself where it is that already."""
    rgb = _without_alpha(image)
    if not image.has_transparency_data or background == DROP:
        return rgb
    alpha = _alpha(image)
    if alpha is None:
        return rgb
    flat = Image.new("RGB", rgb.size, background_colour(background))
    flat.paste(rgb, mask=alpha)
    return flat


def _without_alpha(image: Image.Image) -> Image.Image:
    """RGB, the colours under what is transparent as they are."""
    mode = image.mode
    if mode.startswith(("I", "F")):
        return _to_8bit(image).convert("RGB")
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
    if image.mode.startswith(("I", "F")):
        key = image.info.get("transparency")
        if not isinstance(key, int):
            return None
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA").getchannel("A")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, scaled by the full range that mode and values suggest."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = values.max()
    ranges = (65535,) if image.mode.startswith("I;16") else (255, 65535)
    if image.mode == "F":
        ranges = (1, *ranges)
    full = next((r for r in ranges if peak <= r), peak)
    return Image.fromarray(np.rint(values.clip(0) * (255 / full)).astype(np.uint8))


# By ``Transform.decode_as``.
DECODERS: dict[str, Callable[[Any, str], Any]] = {"PIL": decode, "tensor": decode_tensor}
