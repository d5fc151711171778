"""Image formats: which files are images, and what reading some of them takes."""

import contextlib
import importlib.util
import io
import os
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from pipeline import arrays, dicom, headers, levels
from pipeline.limits import (
    EMPTY,
    BadImageError,
    check_pixels,
    check_regular,
    most_pixels,
    open_regular,
    too_many_pixels,
)

# Pillow's names of the formats that are read, and no others: some of its plug-ins start programs
# (EPS starts Ghostscript), many are hardly ever used. TGA has no signature, so it comes last.
SERVED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # by the HTTP service too
FORMATS = (*SERVED, "JPEG2000", "HEIF", "DIB", "TGA")
# NPY, NPZ and DICOM files are read beside these wherever images are (``levels.image_of_array``).

# Extensions of files that are read as images, in lower case.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp")
    + (".dib", ".gif", ".tif", ".tiff", ".tga", ".webp", ".jp2", ".j2k", ".avif", ".avifs")
    + (".heic", ".heif", ".hif", *arrays.EXTENSIONS, *dicom.EXTENSIONS)
)

# Extensions of images that aren't read: raw files of cameras, drawings, layers.
UNREADABLE = frozenset(
    (".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw")
    + (".orf", ".pef", ".raf", ".rw2", ".sr2", ".srw", ".x3f", ".svg", ".svgz", ".eps", ".ai")
    + (".psd", ".psb", ".xcf", ".jxl", ".jxr", ".wdp", ".exr", ".hdr", ".nii")
)

# Pillow's format, the package that reads it, and the extensions of its files.
_PACKAGES = (
    ("HEIF", "pillow-heif", (".heic", ".heif", ".hif")),
    ("AVIF", "pillow-avif-plugin", (".avif", ".avifs")),
)

_HEAD = 64  # bytes that are looked at
_CURSOR = "CUR"  # begins like a TGA image

# (where, bytes there in lower case, what a file that begins with them is)
_SIGNATURES = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image: git lfs pull fetches it"),
    (0, b"/annex/objects/", "a git-annex pointer, not the image: git annex get fetches it"),
    (0, b"<svg", "an SVG drawing: export it as PNG"),
    (0, b"<?xml", "an XML file or SVG drawing: export it as PNG"),
    (0, b"8bps", "a Photoshop file: export it as PNG"),
    (0, b"\xff\x0a", "a JPEG XL image: convert it to PNG or JPEG"),
    (4, b"jxl ", "a JPEG XL image: convert it to PNG or JPEG"),
    (0, b"<!doctype html", "an HTML page, not an image: download it again"),
    (0, b"<html", "an HTML page, not an image: download it again"),
    (0, b"%pdf", "a PDF document, not an image"),
    (0, b"pk\x03\x04", "a zip archive: unpack it"),
)

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()


def package_for(extension: str) -> str | None:
    """The package that images with this extension need and that isn't installed, else None."""
    if extension in dicom.EXTENSIONS:
        return None if importlib.util.find_spec(dicom.PACKAGE) else dicom.PACKAGE
    for form, package, extensions in _PACKAGES:
        if extension in extensions:
            Image.init()
            return None if form in Image.OPEN else package
    return None


def readable(formats: tuple[str, ...] = FORMATS) -> tuple[str, ...]:
    """Those of ``formats`` that this installation reads."""
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def what_it_is(file: BinaryIO) -> str:
    """What a file that isn't read as an image holds, and what helps."""
    file.seek(0)
    head = file.read(_HEAD)
    if not head:
        return EMPTY
    if head[4:8] == b"ftyp":
        extension = ".avif" if head[8:11] == b"avi" else ".heic"
        package = package_for(extension)
        if package is not None:
            return f"{extension[1:].upper()} needs a package: pip install {package}"
    low = head.lstrip().lower()
    for start, signature, what in _SIGNATURES:
        if low.startswith(signature, start):
            return what
    form = refused_format(head)
    if form:
        return f"a file in {form} format, not read: convert it to PNG or JPEG"
    return "not an image that Pillow can read"


def refused_format(head: bytes) -> str | None:
    """Pillow's name of a format that isn't read, by a file's first bytes."""
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # bytes too few for what is looked for
            refused = name not in (*FORMATS, _CURSOR) and accepts is not None
            if refused and accepts(head[:16]) is True:
                return name
    return None


@contextlib.contextmanager
def open_image(source: Any, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """An image file of which the header alone has been read, checked, and within the limits.

    A JPEG file of more pixels than the limit is let through where it can be read at a part of its
    size (``JpegImageFile.draft``).

    Args:
        source: a path or a seekable binary file.
        formats: Pillow's names of those that are read.

    Raises:
        BadImageError: it is of no such format, or asks for more than the limits.
        OSError: it can't be opened. Damaged files raise what Pillow's plug-ins raise.
    """
    if isinstance(source, str | os.PathLike):
        with open_regular(source) as file, _parsed(file, formats) as image:
            yield image
        return
    if isinstance(source, io.BufferedReader | io.BufferedRandom | io.FileIO):
        check_regular(os.fstat(source.fileno()))
    with _parsed(source, formats) as image:
        yield image


def _parsed(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    file.seek(0)
    head = file.read(_HEAD)
    if head.startswith(headers.JPEG):
        file.seek(0)
        return _parsed_jpeg(file.read())
    image = levels.image_of_array(file)
    if image is not None:
        return image
    _check_header(file, head)
    image = _opened(file, head, readable(formats))
    if image.format in headers.COST:
        check_pixels(f"{image.format} image", *image.size, headers.COST[image.format])
    return image


def _opened(file: BinaryIO, head: bytes, formats: tuple[str, ...]) -> Image.Image:
    sure = tuple(name for name in formats if name != "TGA")
    try:
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(file, formats=sure)
        if "TGA" in formats and not refused_format(head):
            return Image.open(file, formats=("TGA",))
    except UnidentifiedImageError:
        pass
    except Image.DecompressionBombError as error:
        raise _too_large(error) from None
    if "TIFF" in formats and head.startswith(headers.TIFF):
        return levels.image_of_tiff(file)
    raise BadImageError(what_it_is(file))


def _too_large(error: Image.DecompressionBombError) -> BadImageError:
    pixels = re.search(r"\d+", str(error))
    return too_many_pixels(f"an image of {int(pixels[0]):,} pixels" if pixels else "a large image")


def _check_header(file: BinaryIO, head: bytes) -> None:
    if head.startswith(headers.TIFF):
        file.seek(0)
        headers.check_tags(file)
    elif head.startswith(b"\x89PNG"):
        headers.check_png(file)
    elif head.startswith(b"GIF8"):
        headers.check_gif(file)
    elif head.startswith((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"PF", b"Pf", b"Py")):
        headers.check_ppm(head, file)
    elif head.startswith(b"RIFF"):
        headers.check_webp(head)
    elif head[4:8] == b"jP  " or head.startswith(headers.CODESTREAM):
        headers.check_jpeg2000(file)
    elif head[4:8] == b"ftyp":
        file.seek(0)
        headers.check_exif_within(file.read())


def _parsed_jpeg(content: bytes) -> Image.Image:
    frame = headers.check_jpeg(content)
    try:
        # Of a file of several images the first one, whatever its index of them says.
        image = JpegImageFile(file := io.BytesIO(content))
    except (SyntaxError, IndexError, TypeError, struct.error):  # as Image.open
        raise BadImageError(what_it_is(file)) from None
    width, height = image.size
    if width * height > most_pixels() and not (frame and frame.at_once):
        raise too_many_pixels(
            f"a JPEG of {width:,}×{height:,} pixels that must be read whole (progressive)"
        )
    return image


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file of any name holds an image of a kind that is read under another name."""
    try:
        with open_image(path):
            return True
    except Exception:  # Pillow's plug-ins raise almost anything on what is no image
        return False
