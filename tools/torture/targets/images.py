"""Image files of all formats, changed: an image or a BadImageError, the same by both decoders."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.decoding import decode, decode_tensor, is_transparent
from pipeline.formats import FORMATS, readable
from pipeline.limits import BadImageError, limit_pixels, most_pixels
from tools.torture.targets import Target
from tools.torture.targets.mutation import mutated

LIMIT = 1 << 20  # pixels


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _seeds() -> dict[str, list[bytes]]:
    """Small valid files, by format."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    colour = Image.fromarray(noise).resize((36, 24))
    grey, alpha = colour.convert("L"), colour.convert("RGBA")
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [colour.rotate(180)]}
    found = {
        "JPEG": [
            _saved(colour, "JPEG", quality=80, exif=exif),
            _saved(colour, "JPEG", progressive=True),
            _saved(grey, "JPEG", restart_marker_blocks=2),
            _saved(colour.convert("CMYK"), "JPEG"),
            _saved(colour, "MPO", **frames),
        ],
        "PNG": [
            _saved(alpha, "PNG", exif=exif),
            _saved(deep, "PNG", transparency=0),
            _saved(colour.quantize(8), "PNG", transparency=bytes(8)),
            _saved(grey.convert("1"), "PNG"),
            _saved(colour, "PNG", **frames),
        ],
        "GIF": [_saved(colour, "GIF", **frames), _saved(grey, "GIF", transparency=0, comment="a")],
        "TIFF": [
            *(_saved(colour, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "jpeg")),
            _saved(deep, "TIFF", exif=exif),
            _saved(floats, "TIFF", compression="tiff_adobe_deflate"),
            _saved(grey.convert("1"), "TIFF", compression="group4"),
            _saved(alpha, "TIFF", big_tiff=True, tiffinfo={}),
        ],
        "BMP": [_saved(colour, "BMP"), _saved(grey.convert("1"), "BMP"), _saved(alpha, "BMP")],
        "DIB": [_saved(grey, "DIB")],
        "PPM": [
            *(_saved(image, "PPM") for image in (colour, grey, deep, grey.convert("1"))),
            b"P3 2 2 255\n" + b"1 20 255 " * 4,
            b"P6 2 2 60\n" + bytes(range(12)),
        ],
        "TGA": [_saved(alpha, "TGA", compression="tga_rle"), _saved(grey, "TGA")],
        "WEBP": [_saved(alpha, "WEBP", lossless=True), _saved(colour, "WEBP", exif=exif, **frames)],
        "JPEG2000": [_saved(colour, "JPEG2000"), _saved(alpha, "JPEG2000", no_jp2=True)],
        "AVIF": [_saved(alpha, "AVIF", speed=10, exif=exif)] if "AVIF" in FORMATS else [],
        "HEIF": [_saved(colour, "HEIF")] if "HEIF" in readable() else [],
    }
    return {form: found[form] for form in readable()}


SEEDS = _seeds()
_ALL = [content for contents in SEEDS.values() for content in contents]


def _maker(form: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        # Now and then parts of other formats come in.
        seeds = [*SEEDS[form], rng.choice(_ALL)] if rng.random() < 0.2 else SEEDS[form]
        return mutated(rng, seeds)

    return make


def _outcome(read: Callable[[], Any]) -> tuple[int, int] | str:
    """Height and width, or the reason why there is no image."""
    try:
        image = read()
    except BadImageError as error:
        return str(error)
    return image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[1:])


def _read(content: bytes, folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(content)
    before = most_pixels()
    limit_pixels(LIMIT)
    try:
        first = _outcome(lambda: decode(path, "navy"))
        others = [
            _outcome(lambda: decode(content, "drop")),
            _outcome(lambda: decode_tensor(io.BytesIO(content))),
            _outcome(lambda: decode_tensor(path)),
        ]
        for other in others:
            same = isinstance(other, str) if isinstance(first, str) else other == first
            assert same, (first, other)
        if isinstance(first, str):
            raise BadImageError(first)
        assert first[0] * first[1] <= LIMIT
        is_transparent(content)
    finally:
        limit_pixels(before)


TARGETS = tuple(
    Target(f"{form} images", _maker(form), _read, (BadImageError,), share=0.25) for form in SEEDS
)
