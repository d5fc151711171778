"""Greys, bands and 16 bits, compared with the arrays that were written and with Pillow.

Also of pipeline/levels.py.
"""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from augmentation.protocol import RGB, Form
from pipeline.bands import decode_bands, has_more_levels, shown
from pipeline.decoding import decode
from pipeline.limits import BadImageError

RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 256, (6, 9, 5), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9, 4), dtype=np.uint16)
CONTIG = {"photometric": "minisblack", "planarconfig": "contig"}


def saved(write) -> bytes:
    write(buffer := io.BytesIO())
    return buffer.getvalue()


def png16(pixels: np.ndarray) -> bytes:
    """A PNG file of 16-bit colours, which Pillow doesn't write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">L", zlib.crc32(kind + data))
        return struct.pack(">L", len(data)) + kind + data + crc

    height, width, bands = pixels.shape
    header = struct.pack(">LLBBBBB", width, height, 16, {3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: np.save(file, FIVE),
        lambda file: np.save(file, FIVE.transpose(2, 0, 1)),
        lambda file: np.save(file, np.asfortranarray(FIVE)),
        lambda file: np.savez_compressed(file, image=FIVE, label=3),
        lambda file: tifffile.imwrite(file, FIVE, **CONTIG),
        lambda file: tifffile.imwrite(file, FIVE, compression="zlib", predictor=True, **CONTIG),
        lambda file: tifffile.imwrite(file, FIVE.transpose(2, 0, 1)),  # an image for each band
        lambda file: tifffile.imwrite(
            file, FIVE.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"
        ),
    ],
)
def test_five_bands_come_as_they_were_written(write, tmp_path):
    (tmp_path / "x").write_bytes(saved(write))
    found = decode_bands(str(tmp_path / "x"), Form(5))
    np.testing.assert_array_equal(found.numpy(), FIVE.transpose(2, 0, 1))
    with pytest.raises(BadImageError, match="5.*4"):
        decode_bands(str(tmp_path / "x"), Form(4))


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_sixteen_bits_are_kept(bands):
    pixels = DEEP[..., :bands]
    files = [saved(lambda file: np.save(file, pixels))]
    if bands == 1:
        files.append(saved(lambda file: Image.fromarray(pixels[..., 0]).save(file, "PNG")))
    else:
        files.append(png16(pixels))
        kind = {"photometric": "rgb", "planarconfig": "contig"}
        files.append(saved(lambda file: tifffile.imwrite(file, pixels, **kind)))
    for content in files:
        found = decode_bands(content, Form(bands, 16)).numpy()
        np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))


def test_depths_become_each_other():
    eight = decode_bands(FIVE, Form(5, 16)).numpy()
    np.testing.assert_array_equal(eight, FIVE.transpose(2, 0, 1).astype(np.uint16) * 257)
    wanted = np.rint(DEEP.transpose(2, 0, 1) * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(decode_bands(DEEP, Form(4)).numpy(), wanted)
    floats = saved(lambda file: np.save(file, DEEP / 65535))
    np.testing.assert_array_equal(
        decode_bands(floats, Form(4, 16)).numpy(), DEEP.transpose(2, 0, 1)
    )


def test_colours_and_transparency_by_channels():
    image = Image.fromarray(RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    content = saved(lambda file: image.save(file, "PNG"))
    bands = decode_bands(content, Form(4)).numpy()
    np.testing.assert_array_equal(bands, np.asarray(image).transpose(2, 0, 1))
    grey = decode_bands(content, Form(1), "red").numpy()
    np.testing.assert_array_equal(grey[0], np.asarray(decode(content, "red").convert("L")))
    deep = decode_bands(content, Form(3, 16), "red").numpy() / 257
    rgb = np.asarray(decode(content, "red")).transpose(2, 0, 1)
    assert np.abs(deep - rgb).max() <= 1
    opaque = saved(lambda file: image.convert("RGB").save(file, "PNG"))
    with pytest.raises(BadImageError, match="3 bands, not the 4"):
        decode_bands(opaque, Form(4))


def test_orientation_turns_bands():
    image = Image.fromarray(RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(lambda file: image.save(file, "PNG", exif=exif))
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_bands(content, Form(4)).numpy(), turned)


def test_three_colours_of_8_bits_from_numbers():
    pixels = FIVE[..., :3]
    for content in (saved(lambda f: np.save(f, pixels)), saved(lambda f: np.savez(f, pixels))):
        np.testing.assert_array_equal(np.asarray(decode(content)), pixels)
    grey = saved(lambda file: np.save(file, pixels[..., 0]))
    np.testing.assert_array_equal(np.asarray(decode(grey))[..., 2], pixels[..., 0])
    with pytest.raises(BadImageError, match="--in-chans"):
        decode(saved(lambda file: np.save(file, FIVE)))


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((3, 8, 3), np.uint8), "first or last"),
        (np.zeros((8, 8, 7), np.uint8), "8×8×7"),
        (np.full((8, 8), np.nan), "floats from nan"),
        (np.full((8, 8), 2.0), "0-1"),
        (np.full((8, 8), -5, np.int16), "shift them"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.zeros((8, 8), np.complex64), "complex64"),
        (np.zeros(8, np.uint8), "H×W"),
        (np.zeros((0, 8), np.uint8), "0×8"),
    ],
)
def test_numbers_that_are_no_image(array, what):
    with pytest.raises(BadImageError, match=what):
        decode_bands(saved(lambda file: np.save(file, array)), Form(3, 16))


def test_what_people_see_of_bands():
    image = shown(saved(lambda file: np.save(file, FIVE)), Form(5))
    low, high = np.percentile(FIVE[..., 0], (2, 98))
    red = np.rint(((FIVE[..., 0] - low) * (255 / (high - low))).clip(0, 255))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], red)
    grey = FIVE[..., 0]
    np.testing.assert_array_equal(np.asarray(shown(grey, Form(1)))[..., 1], grey)
    assert shown(FIVE[..., :3], RGB).mode == "RGB"


def test_files_of_more_than_256_levels_are_known_by_their_headers(tmp_path):
    grey, colours = DEEP[..., 0], DEEP[..., :3]
    eight = (colours >> 8).astype(np.uint8)
    deep = [
        saved(lambda file: Image.fromarray(grey).save(file, "png")),
        png16(colours),
        saved(lambda file: tifffile.imwrite(file, colours, photometric="rgb")),
        saved(lambda file: tifffile.imwrite(file, grey.astype(np.float32))),
        grey,
    ]
    usual = [
        saved(lambda file: Image.fromarray(eight).save(file, "png")),
        saved(lambda file: Image.fromarray(eight).save(file, "jpeg")),
        saved(lambda file: tifffile.imwrite(file, eight, photometric="rgb")),
        eight,
        b"no image",
    ]
    assert [has_more_levels(encoded) for encoded in deep + usual] == [True] * 5 + [False] * 5
    path = tmp_path / "a.png"
    path.write_bytes(deep[0])
    assert has_more_levels(str(path))
    assert not has_more_levels(str(tmp_path / "none.png"))
