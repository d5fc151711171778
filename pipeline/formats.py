"""Image formats: which files are images, and what reading some of them takes."""

import contextlib
from pathlib import Path
from typing import Any

from PIL import Image

# Extensions of files that are read as images, in lower case.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp")
    + (".dib", ".gif", ".tif", ".tiff", ".tga", ".webp", ".jp2", ".j2k", ".avif", ".avifs")
    + (".heic", ".heif", ".hif")
)

# Extensions of images that aren't read: raw files of cameras, drawings, layers.
UNREADABLE = frozenset(
    (".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw")
    + (".orf", ".pef", ".raf", ".rw2", ".sr2", ".srw", ".x3f", ".svg", ".svgz", ".eps", ".ai")
    + (".psd", ".psb", ".xcf", ".jxl", ".jxr", ".wdp", ".exr", ".hdr", ".dcm", ".nii")
)

# Pillow's format, the package that reads it, and the extensions of its files.
_PACKAGES = (
    ("HEIF", "pillow-heif", (".heic", ".heif", ".hif")),
    ("AVIF", "pillow-avif-plugin", (".avif", ".avifs")),
)

_HEAD = 64  # bytes that are looked at

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
    for form, package, extensions in _PACKAGES:
        if extension in extensions:
            Image.init()
            return None if form in Image.OPEN else package
    return None


def what_it_is(source: Any) -> str:
    """What a path, bytes or a binary file that Pillow doesn't know holds, and what helps."""
    head = b""
    with contextlib.suppress(OSError):
        if isinstance(source, bytes | bytearray | memoryview):
            head = bytes(source[:_HEAD])
        elif hasattr(source, "read"):
            source.seek(0)
            head = source.read(_HEAD)
        else:
            with open(source, "rb") as file:
                head = file.read(_HEAD)
    if not head:
        return "an empty file: copy or download it again"
    if head[4:8] == b"ftyp":
        extension = ".avif" if head[8:11] == b"avi" else ".heic"
        package = package_for(extension)
        if package is not None:
            return f"{extension[1:].upper()} needs a package: pip install {package}"
    low = head.lstrip().lower()
    for start, signature, what in _SIGNATURES:
        if low.startswith(signature, start):
            return what
    return "not an image that Pillow can read"


def is_image(path: Path | str) -> bool:
    """Whether a file of any name holds an image of a kind that is read under another name."""
    try:
        with Image.open(path) as image:
            known = Image.registered_extensions()
            return any(known.get(extension) == image.format for extension in EXTENSIONS)
    except Exception:  # Pillow's plug-ins raise almost anything on what is no image
        return False
