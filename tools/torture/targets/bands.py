"""Images of other kinds: NPY, NPZ, TIFF of bands, PNG of 16 bits, DICOM.

Damaged in their structure: what headers, directories and chunks say, with sums that fit.
"""

import importlib.util
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from augmentation.protocol import RGB, Form
from pipeline.bands import decode_bands
from pipeline.decoding import decode
from pipeline.limits import BadImageError, limit_pixels, most_pixels
from tools.torture.targets import Target
from tools.torture.targets.images import LIMIT
from tools.torture.targets.mutation import mutated, mutated_text, odd_text

_FORMS = (RGB, Form(1), Form(1, 16), Form(3, 16), Form(4), Form(5, 16), Form(2, 16))


class Given(NamedTuple):
    """A file, and what a model takes of it."""

    content: bytes
    form: Form
    whole: bytes = b""
    """The file as it was, of one whose numbers have a checksum."""


def _ramp(*shape: int, dtype: str = "u1") -> np.ndarray:
    values = np.arange(np.prod(shape)).reshape(shape)
    return values / values.max() if dtype.endswith(("f4", "f8")) else values.astype(dtype) * 7


# --- NPY and NPZ ----------------------------------------------------------------------------------

_ARRAYS = [_ramp(6, 9, 3), _ramp(5, 6, 9, dtype="<u2"), _ramp(6, 9, dtype="<i2")]
_ARRAYS += [_ramp(9, 6, 4, dtype="<f4").astype("f4"), np.asfortranarray(_ramp(6, 9, 2))]
_DTYPES = ("|u1", "<u2", ">u2", "<i2", "<f4", "<f8", "<f2", "|b1", "|O", "<U9", "|S3", "<c8", "<M8")
_DTYPES += ("<u8", "|V5", "<f16", "u1", "(2,3)u1", "9999999999u1", "i4,f8", "<u2,", "", "object")
_SIZES = (0, 1, 2, 3, 6, 9, -1, 65536, 2**31, 2**32, 2**63, 2**64, 10**30)
_CODE = ("__import__('os').getcwd()", "(6, 9) * 9", "{}", "[6, 9]", "(6, [9])", "()", "(True, 9)")


def _npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _odd_npy(rng: random.Random) -> bytes:
    """A header that says anything, above the numbers of an array."""
    array = rng.choice(_ARRAYS)
    shape: Any = array.shape
    kind, order = array.dtype.str, bool(rng.randrange(2))
    for _ in range(rng.randrange(1, 3)):
        chance = rng.random()
        if chance < 0.4:
            sides = [rng.choice(_SIZES) if rng.random() < 0.5 else side for side in array.shape]
            shape = tuple(sides * rng.choice((1, 1, 1, 0, 2, 20)))
        elif chance < 0.6:
            kind = rng.choice(_DTYPES)
        elif chance < 0.7:
            shape = rng.choice(_CODE)
    text = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if rng.random() < 0.3:
        text = mutated_text(rng, [text])
    if rng.random() < 0.05:
        text = rng.choice(("(", "[", "{'a':", "-", "not ")) * rng.choice((100, 3000))
    header = text.encode("utf-8", "replace")
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    version = rng.choice((1, 1, 1, 2, 3, 0, 9))
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 9_999, 65_535))
    size = struct.pack("<H" if version < 2 else "<I", min(length, 65_535))
    return b"\x93NUMPY" + bytes((version, 0)) + size + header + array.tobytes()


def _npy(rng: random.Random) -> Given:
    content = mutated(rng, _SEEDS["NPY"]) if rng.random() < 0.4 else _odd_npy(rng)
    return Given(content, rng.choice(_FORMS))


def _archive(rng: random.Random, members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            packed = rng.choice((0, 0, 8, 8, 12, 14))  # stored, deflated, bzip2, LZMA
            archive.writestr(name.replace("\0", "x"), content, packed)
    return buffer.getvalue()


def _name(rng: random.Random) -> str:
    return odd_text(rng)[:99].encode("utf-8", "replace").decode()


def _npz(rng: random.Random) -> Given:
    form = rng.choice(_FORMS)
    chance = rng.random()
    if chance < 0.2:
        return Given(mutated(rng, _SEEDS["NPZ"]), form)
    if chance < 0.5:
        # What is damaged by chance, and can be told by its sums.
        whole = rng.choice(_SEEDS["NPZ"])
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 40))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return Given(bytes(damaged), form, whole)
    names = [rng.choice(("image", "arr_0", "x", _name(rng))) for _ in range(3)]
    names = list(dict.fromkeys(f"{name}.npy" for name in names))[: rng.choice((1, 1, 2, 3))]
    content = _archive(rng, [(name, _npy(rng).content) for name in names])
    if rng.random() < 0.3:
        # What the directory says of sizes and places.
        place = content.rfind(b"PK\1\2") + rng.choice((8, 10, 16, 20, 24, 28, 42))
        word = struct.pack("<I", rng.choice((0, 1, 8, 99, 2**31, 2**32 - 1)))
        content = content[:place] + word + content[place + 4 :]
    return Given(content, form)


# --- TIFF -----------------------------------------------------------------------------------------


def _tiffs() -> list[bytes]:
    """Small files of bands, as tifffile writes them."""
    import tifffile

    found = []
    for array, options in (
        (_ramp(6, 9, 5, dtype="<u2"), {"planarconfig": "contig"}),
        (_ramp(5, 6, 9), {"planarconfig": "separate", "compression": "deflate"}),
        (_ramp(32, 32, 2, dtype="<u2"), {"tile": (16, 16), "planarconfig": "contig"}),
        (_ramp(6, 9, 4, dtype="<f4").astype("f4"), {"compression": "deflate", "predictor": 1}),
        (_ramp(2, 6, 9, dtype="<u2"), {"planarconfig": None}),
        (_ramp(6, 9, 3, dtype="<u2"), {"photometric": "rgb", "bigtiff": True}),
        (_ramp(64, 9, 4), {"compression": "deflate", "rowsperstrip": 8, "predictor": 2}),
    ):
        buffer = io.BytesIO()
        options = {"photometric": "minisblack", "metadata": None, **options}
        tifffile.imwrite(buffer, array, **options)
        found.append(buffer.getvalue())
    return found


_TIFF_TAGS = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339)
_TIFF_VALUES = (0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 255, 1025, 8192, 65_535, 2**31, 2**32 - 1)


def _tiff(rng: random.Random) -> Given:
    form = rng.choice(_FORMS[2:])
    content = bytearray(rng.choice(_SEEDS["TIFF of bands"]))
    if rng.random() < 0.3 or content[2] != 42:
        return Given(mutated(rng, _SEEDS["TIFF of bands"]), form)
    directory = struct.unpack_from("<I", content, 4)[0]
    count = struct.unpack_from("<H", content, directory)[0]
    for _ in range(rng.randrange(1, 4)):
        entry = directory + 2 + 12 * rng.randrange(count)
        chance = rng.random()
        if chance < 0.55:
            code, value = rng.choice((("<H", 8), ("<I", 8), ("<I", 4), ("<H", 2)))
            most = 256 ** struct.calcsize(code)
            struct.pack_into(code, content, entry + value, rng.choice(_TIFF_VALUES) % most)
        elif chance < 0.7:
            struct.pack_into("<H", content, entry, rng.choice(_TIFF_TAGS))
        elif chance < 0.8:
            struct.pack_into("<H", content, directory, rng.choice((0, 1, count + 1, 65_535)))
        elif chance < 0.9:  # the next directory: itself, the same again, anywhere
            following = directory + 2 + 12 * count
            place = rng.choice((directory, 8, len(content) - 2, 2**32 - 1, rng.randrange(999)))
            struct.pack_into("<I", content, following, place)
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return Given(bytes(content), form)


# --- PNG of 16 bits -------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    named = kind + content
    return struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))


def _png_of(values: tuple[int, ...], raw: bytes, more: list[tuple[bytes, bytes]]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *values)), *more, (b"IDAT", zlib.compress(raw))]
    chunks.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


_PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}  # of the colour types
_PNG_CHUNKS = (b"tRNS", b"PLTE", b"gAMA", b"sBIT", b"bKGD", b"eXIf", b"iCCP", b"acTL", b"fcTL")


def _png(rng: random.Random) -> Given:
    form = rng.choice((Form(1, 16), Form(3, 16), Form(4, 16), *_FORMS))
    colour = rng.choice(list(_PNG_BANDS))
    width, height = 9, 6
    line = 2 * width * _PNG_BANDS[colour]
    raw = b"".join(bytes((rng.randrange(5),)) + rng.randbytes(line) for _ in range(height))
    values = [width, height, 16, colour, 0, 0, 0]
    if rng.random() < 0.3:
        whole = _png_of(tuple(values), raw, [])
        damaged = bytearray(whole)
        damaged[rng.randrange(8, len(damaged))] ^= 1 << rng.randrange(8)
        return Given(bytes(damaged), form, whole)
    if rng.random() < 0.6:
        place = rng.randrange(7)
        sizes = (0, 1, 5, 10, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
        values[place] = rng.choice(sizes if place < 2 else (0, 1, 2, 3, 4, 6, 8, 16, 255))
    if rng.random() < 0.4:
        raw = rng.choice((raw[: rng.randrange(len(raw))], raw * 50, mutated(rng, [raw])))
    more = []
    for _ in range(rng.choice((0, 0, 1, 2))):
        more.append((rng.choice(_PNG_CHUNKS), rng.randbytes(rng.choice((0, 2, 6, 26, 300)))))
    content = _png_of(tuple(values), raw, more)
    return Given(mutated(rng, [content], 1) if rng.random() < 0.3 else content, form)


# --- DICOM ----------------------------------------------------------------------------------------

_LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF")  # whose lengths have four bytes
_KINDS = (*_LONG, b"US", b"SS", b"DS", b"IS", b"CS", b"LO", b"UI", b"PN", b"AT", b"FD", b"xx")
_SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.9", "")
_SYNTAXES += ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5")
_TEXTS = (
    b"",
    b"0",
    b"1",
    b"-1",
    b"1e400",
    b"nan",
    b"1\\2\\3",
    b"9" * 400,
    b"x",
    b"\xff\xfe",
    b"0.5",
)
_WORDS = (b"MONOCHROME1", b"MONOCHROME2", b"RGB", b"YBR_FULL", b"PALETTE COLOR", b"SIGMOID")

Element = tuple[int, int, bytes, bytes]
"""Group, number, representation and value."""


def _elements(rng: random.Random) -> list[Element]:
    """A grey or coloured image."""
    colours, deep = rng.random() < 0.2, rng.random() < 0.7
    bits = 16 if deep and not colours else 8
    samples = 3 if colours else 1

    def number(value: int) -> bytes:
        return struct.pack("<H", value)

    found = [(0x28, 0x02, b"US", number(samples))]
    found.append((0x28, 0x04, b"CS", b"RGB " if colours else rng.choice(_WORDS[:2]) + b" "))
    found += [(0x28, 0x06, b"US", number(0))] if colours else []
    found += [(0x28, 0x10, b"US", number(6)), (0x28, 0x11, b"US", number(8))]
    found += [(0x28, 0x100, b"US", number(bits)), (0x28, 0x101, b"US", number(bits))]
    found += [(0x28, 0x102, b"US", number(bits - 1)), (0x28, 0x103, b"US", number(0))]
    found += [(0x28, 0x1050, b"DS", b"40\\50 "), (0x28, 0x1051, b"DS", b"80\\99 ")]
    found += [(0x28, 0x1052, b"DS", b"-10 "), (0x28, 0x1053, b"DS", b"1.5 ")]
    found.append((0x28, 0x1056, b"CS", b"LINEAR"))
    found.append((0x7FE0, 0x10, b"OW", bytes(range(48)) * samples * (bits // 8)))
    return found


def _encoded(element: Element, *, implicit: bool) -> bytes:
    group, number, kind, value = element
    tag = struct.pack("<HH", group, number)
    if implicit:
        return tag + struct.pack("<I", len(value)) + value
    if kind in _LONG:
        return tag + kind + b"\0\0" + struct.pack("<I", len(value)) + value
    return tag + kind + struct.pack("<H", len(value) & 0xFFFF) + value


def _nested(rng: random.Random) -> Element:
    """Sequences in one another, of lengths that are said or not."""
    value = b""
    for _ in range(rng.choice((1, 5, 60, 2000))):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value
        value = struct.pack("<HH", 0x08, 0x1140) + b"SQ\0\0" + struct.pack("<I", len(item)) + item
    unsaid = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) * rng.choice((1, 30, 3000))
    return (0x08, 0x1140, b"SQ", value if rng.random() < 0.6 else unsaid)


def _odd_element(rng: random.Random, element: Element) -> Element:
    group, number, kind, value = element
    chance = rng.random()
    if chance < 0.4 and kind == b"US":
        return group, number, kind, struct.pack("<H", rng.choice((0, 1, 7, 12, 17, 32, 65_535)))
    if chance < 0.7:
        return group, number, kind, rng.choice((*_TEXTS, *_WORDS, rng.randbytes(6)))
    if chance < 0.8:
        return group, number, rng.choice(_KINDS), value
    if chance < 0.9:
        return group, number, kind, value * rng.choice((0, 2, 50))
    return rng.choice((0x08, 0x10, 0x28, 0x40, 0x5400)), rng.randrange(0x2000), kind, value


def _dicom(rng: random.Random) -> Given:
    elements = _elements(rng)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        place = rng.randrange(len(elements))
        elements[place] = _odd_element(rng, elements[place])
    if rng.random() < 0.1:
        elements.append((0x28, 0x08, b"IS", rng.choice(_TEXTS)))  # frames
    if rng.random() < 0.1:
        elements.append(_nested(rng))
    if rng.random() < 0.1:
        del elements[rng.randrange(len(elements))]
    if rng.random() < 0.9:
        elements.sort(key=lambda element: element[:2])
    syntax = _SYNTAXES[0] if rng.random() < 0.8 else rng.choice(_SYNTAXES)
    padded = syntax.encode() + b"\0" * (len(syntax) % 2)
    head = _encoded((2, 0x10, b"UI", padded), implicit=False)
    head = _encoded((2, 0, b"UL", struct.pack("<I", len(head))), implicit=False) + head
    implicit = (syntax == _SYNTAXES[1]) is (rng.random() < 0.95)
    content = bytes(128) + b"DICM" + head
    content += b"".join(_encoded(element, implicit=implicit) for element in elements)
    return Given(mutated(rng, [content]) if rng.random() < 0.4 else content, rng.choice(_FORMS))


# --- reading --------------------------------------------------------------------------------------

_SEEDS: dict[str, list[bytes]] = {
    "NPY": [_npy_of(array) for array in _ARRAYS],
    "NPZ": [
        _archive(random.Random(number), [("image.npy", _npy_of(array))])
        for number, array in enumerate(_ARRAYS)
    ],
}
_MAKERS: dict[str, Callable[[random.Random], Given]] = {"NPY": _npy, "NPZ": _npz}
_MAKERS["16-bit PNG"] = _png
if importlib.util.find_spec("tifffile"):
    _SEEDS["TIFF of bands"] = _tiffs()
    _MAKERS["TIFF of bands"] = _tiff
if importlib.util.find_spec("pydicom"):
    _MAKERS["DICOM"] = _dicom


def _pixels(read: Callable[[], Any]) -> np.ndarray | str:
    """uint8 or uint16 (C, H, W), or the reason why there is no image."""
    try:
        image = read()
    except BadImageError as error:
        assert "\n" not in str(error), error
        return str(error)
    return np.asarray(image)


def _same(first: np.ndarray | str, other: np.ndarray | str) -> bool:
    if isinstance(first, str) or isinstance(other, str):
        return isinstance(first, str) and isinstance(other, str)
    return first.dtype == other.dtype and np.array_equal(first, other)


def _read(given: Given, folder: Path) -> None:
    """By path and of bytes, as the model takes it and as people see it: an image, or a reason."""
    path = folder / "image"
    path.write_bytes(given.content)
    before = most_pixels()
    limit_pixels(LIMIT)
    try:
        found = _pixels(lambda: decode_bands(path, given.form))
        again = _pixels(lambda: decode_bands(given.content, given.form))
        assert _same(found, again), (found, again)
        seen = _pixels(lambda: decode(given.content))
        if given.form == RGB and not isinstance(found, str):
            assert _same(found.transpose(1, 2, 0), seen), (found.shape, seen)
        if isinstance(found, str):
            raise BadImageError(found)
        bands, height, width = found.shape
        assert bands == given.form.channels and height * width <= LIMIT
        assert found.dtype == (np.uint8 if given.form.bit_depth == 8 else np.uint16)
        if given.whole:
            whole = _pixels(lambda: decode_bands(given.whole, given.form))
            assert _same(found, whole), "read as another image"
    finally:
        limit_pixels(before)


TARGETS = tuple(
    Target(f"{name} files", make, _read, (BadImageError,), share=0.5)
    for name, make in _MAKERS.items()
)
