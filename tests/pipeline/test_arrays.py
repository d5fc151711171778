"""Files of numbers that mean harm: what a header says is bounded before it is believed."""

import io
import resource
import struct
import zipfile
import zlib

import numpy as np
import pytest
import tifffile

from augmentation.protocol import Form
from pipeline.bands import decode_bands
from pipeline.limits import BadImageError, TooLargeError

FORM = Form(5)


def npy(shape: str, kind: str = "|u1", body: bytes = b"\0" * 64) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (npy("(99999, 99999, 5)"), TooLargeError),
        (npy("(9, 9, 5)"), BadImageError),  # fewer bytes than it says
        (npy("(-9, 9, 5)"), BadImageError),
        (npy("(-1, 9, 5)", body=bytes(90)), BadImageError),  # whose size would be guessed
        (npy("(9, 9, 5)", "|O"), BadImageError),  # would be unpickled
        (npy("(9, 9, 5)", "|V99999999"), BadImageError),
        (npy("(9" + ",9" * 40 + ")"), BadImageError),
        (npy("[" * 3000), BadImageError),
        (npy("(9, 9, 10**9)"), BadImageError),
        (b"\x93NUMPY\2\0\xff\xff\xff\x7f{", BadImageError),
        (b"\x93NUMPY\1\0", BadImageError),
        (b"\x93NUMPY", BadImageError),
        (b"\x93NUMPY\x09\0" + bytes(90), BadImageError),
    ],
)
def test_npy_headers_that_lie(content, error):
    with pytest.raises(error):
        decode_bands(content, FORM)


def zipped(name: str, content: bytes, **options) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", **options) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def test_npz_archives_that_lie():
    large = npy("(99999, 99999, 5)", body=bytes(1 << 20))
    with pytest.raises(TooLargeError):
        decode_bands(zipped("x.npy", large, compression=zipfile.ZIP_DEFLATED), FORM)
    with pytest.raises(BadImageError, match="odd way"):
        decode_bands(zipped("x.npy", npy("(2, 2, 5)"), compression=zipfile.ZIP_LZMA), FORM)
    np.savez(buffer := io.BytesIO(), a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(BadImageError, match="2 arrays"):
        decode_bands(buffer.getvalue(), FORM)
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(1500):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(BadImageError, match="directory"):
        decode_bands(many.getvalue(), FORM)
    good = zipped("x.npy", npy("(2, 2, 5)", body=bytes(20)))
    decode_bands(good, FORM)
    for cut in range(30, len(good), 7):
        with pytest.raises(BadImageError):
            decode_bands(good[:cut], FORM)


def test_a_header_of_other_sides_is_refused():
    """Its pixels would be others, and no checksum be compared."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 5), np.uint8)
    for save in (np.save, np.savez):
        save(buffer := io.BytesIO(), pixels)
        for shape in (b"(64, 32, 5)", b"(32, 64, 5)", b"(64, 60, 5)"):
            with pytest.raises(BadImageError, match="damaged NP[YZ] file: its header says"):
                decode_bands(buffer.getvalue().replace(b"(64, 64, 5)", shape), FORM)


def test_a_damaged_npz_gives_no_other_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 5), np.uint8)
    rng = np.random.default_rng(2)
    for save in (np.savez, np.savez_compressed):
        save(buffer := io.BytesIO(), image=pixels)
        for _ in range(200):
            damaged = bytearray(buffer.getvalue())
            damaged[rng.integers(rng.choice((250, len(damaged))))] ^= 1 << int(rng.integers(8))
            try:
                read = decode_bands(bytes(damaged), FORM).numpy()
            except BadImageError:
                continue
            assert (read == pixels.transpose(2, 0, 1)).all()


def tiff(**tags: int) -> bytes:
    """A TIFF file of 5 bands with tags overwritten by their number."""
    pixels = np.zeros((8, 8, 5), np.uint8)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(buffer := io.BytesIO(), pixels, **options)
    content = bytearray(buffer.getvalue())
    (start,) = struct.unpack_from("<L", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from("<HH", content, entry)
        if (value := tags.get(f"t{tag}")) is not None:
            struct.pack_into("<H" if kind == 3 else "<L", content, entry + 8, value)
    return bytes(content)


@pytest.mark.parametrize(
    "tags",
    [
        {"t256": 65000, "t257": 65000},  # width and height
        {"t277": 60000},  # bands
        {"t257": 0},
        {"t273": 2**31},  # where the strips are
        {"t259": 34925},  # LZMA
        {"t259": 8},  # deflate, and the strips are none
        {"t262": 3},
        {"t284": 2},  # a strip for each band, of which there is one
        {"t284": 0},
        {"t284": 8192},
    ],
)
def test_tiff_tags_that_lie(tags):
    with pytest.raises(BadImageError):
        decode_bands(tiff(**tags), FORM)


def test_a_tiff_that_needs_a_package_says_which(monkeypatch):
    pixels = np.zeros((8, 8, 5), np.float32)
    tifffile.imwrite(buffer := io.BytesIO(), pixels, compression="zlib", predictor=False)
    monkeypatch.setattr(tifffile.TiffPage, "predictor", 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadImageError, match="pip install imagecodecs, or save it without"):
        decode_bands(buffer.getvalue(), FORM)


def test_a_tiff_strip_that_holds_far_more_is_not_inflated():
    pixels = np.zeros((64, 64, 5), np.uint8)
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    tifffile.imwrite(buffer := io.BytesIO(), pixels, **options)
    content = buffer.getvalue()
    bomb = zlib.compressobj(1)
    data = b"".join(bomb.compress(bytes(1 << 24)) for _ in range(5)) + bomb.flush()
    page = tifffile.TiffFile(io.BytesIO(content)).pages.first
    damaged = bytearray(content + data)
    for code, value in ((273, len(content)), (279, len(data))):
        tag = page.tags[code]
        form = "<L" if tag.dtype == 4 else "<H"
        assert form == "<L" or value < 65536
        struct.pack_into(form, damaged, tag.valueoffset, value)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImageError, match="more than the image"):
        decode_bands(bytes(damaged), FORM)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 << 10  # KiB


def test_directories_in_a_circle_end():
    content = bytearray(tiff())
    (start,) = struct.unpack_from("<L", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    struct.pack_into("<L", content, start + 2 + 12 * count, start)
    with pytest.raises(BadImageError, match="images"):
        decode_bands(bytes(content), FORM)


def test_flipped_bits_raise_nothing_else():
    rng = np.random.default_rng(1)
    np.save(buffer := io.BytesIO(), np.zeros((8, 8, 5), np.uint8))
    np.savez_compressed(archive := io.BytesIO(), np.zeros((8, 8, 5), np.uint8))
    for content in (buffer.getvalue(), archive.getvalue(), tiff()):
        for _ in range(120):
            damaged = bytearray(content)
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] ^= 1 << int(rng.integers(8))
            try:
                assert len(decode_bands(bytes(damaged), FORM)) == 5
            except BadImageError:
                continue
