"""Files of numbers that are images: NPY, NPZ, and TIFF of bands that Pillow has no mode for.

What a header asks for is checked before any of it is allocated. Nothing is unpickled.
"""

import importlib.util
import io
import logging
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline import headers
from pipeline.limits import BadImageError, check_pixels

NPY = b"\x93NUMPY"
ZIP = b"PK\x03\x04"
EXTENSIONS = (".npy", ".npz")
MOST_BANDS = 1024
_MOST_HEADER = 10_000  # bytes of text, as numpy's own limit
_MOST_DIRECTORY = 1 << 16  # bytes: an archive of an image holds few arrays
_MOST_SEGMENTS = 1 << 16  # of a TIFF image
_INFLATED = 1032  # times its size that deflated data can hold at most
_UNCHECKED = 64 << 20  # bytes that a segment may hold without being looked at first
_PLAIN_TIFF = {1: "none", 8: "deflate", 32946: "deflate"}
_PALETTE = 3  # TIFF's photometric interpretation
_PIXELS, _PLANES = 1, 2  # and planar configuration
_FLOAT_PREDICTOR = 3
_EOCD = struct.Struct("<4s4H2LH")  # of a zip archive: the end of its directory
_NAMES = ("image", "arr_0")  # of the array that is meant, where there are several


class ArrayFile(NamedTuple):
    """An image in a file of numbers; its header alone has been read."""

    form: str
    """"NPY", "NPZ" or "TIFF"."""
    shape: tuple[int, ...]
    """Of what ``read`` gives."""
    read: Callable[[], np.ndarray]
    """The numbers: uint8, uint16, int16 or floats. Raises BadImageError."""
    axes: str = ""
    """Where the bands are, "first" or "last"; empty: the file doesn't say."""


def array_file(file: BinaryIO) -> ArrayFile | None:
    """The array of an NPY or NPZ file; None for any other file. Raises BadImageError."""
    file.seek(0)
    head = file.read(30)
    if head.startswith(NPY):
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        shape, read = _npy(file, size, "NPY")
        return ArrayFile("NPY", shape, read)
    if head.startswith(ZIP) and file.read(int.from_bytes(head[26:28], "little")).endswith(b".npy"):
        return _npz(file)
    return None


def _npy(file: BinaryIO, size: int, form: str) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
    """The shape of an array, and what reads it, of a file at its beginning with ``size`` bytes."""
    start = file.read(8)
    wide = 2 if start[6:7] == b"\1" else 4
    length = int.from_bytes(file.read(wide), "little")
    if len(start) < 8 or start[6] not in (1, 2, 3) or length > _MOST_HEADER:
        raise BadImageError(f"a damaged {form} file")
    text = file.read(length)
    parse = (
        np.lib.format.read_array_header_1_0 if wide == 2 else np.lib.format.read_array_header_2_0
    )
    try:
        shape, fortran, kind = parse(
            io.BytesIO(length.to_bytes(wide, "little") + text), max_header_size=_MOST_HEADER
        )
    except Exception:  # numpy evaluates the text, which may raise anything
        raise BadImageError(f"a damaged {form} file") from None
    _check_kind(kind, form)
    _check_shape(shape, kind.itemsize, form)
    needed, there = math.prod(shape) * kind.itemsize, size - len(start) - wide - length
    if needed > there:
        raise BadImageError(f"is cut off: {form} of {needed:,} bytes, a file of {size:,}")
    # A header of other sides would give a sheared image; and an archive compares its checksum only
    # with a member that is read whole.
    if needed < there:
        raise BadImageError(f"a damaged {form} file: its header says {needed:,} of {there:,} bytes")

    def read() -> np.ndarray:
        content = file.read(needed)
        if len(content) < needed:
            raise BadImageError(f"is cut off: {form} of {needed:,} bytes")
        array = np.frombuffer(content, dtype=kind)
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)

    return shape, read


def _check_kind(kind: np.dtype, form: str) -> None:
    if kind.hasobject:
        raise BadImageError(f"{form} of Python objects, which are not unpickled: save numbers")
    if kind.newbyteorder("=") not in (np.uint8, np.uint16, np.int16, np.float16, *_FLOATS):
        raise BadImageError(f"{form} of {kind}: save uint8, uint16, or floats in 0-1")


_FLOATS = (np.float32, np.float64)


def _check_shape(shape: tuple[int, ...], itemsize: int, form: str) -> None:
    """Raise BadImageError for what is no image, or too large a one."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        given = "×".join(map(str, shape)) or "one number"
        raise BadImageError(f"{form} of {given}: an image has H×W, H×W×C or C×H×W numbers")
    bands = min(shape[0], shape[-1]) if len(shape) == 3 else 1
    if bands > MOST_BANDS:
        raise BadImageError(f"{form} of {bands:,} bands: more than {MOST_BANDS:,}")
    area = math.prod(shape) // bands
    # As it is read, as it is kept, and what lies between.
    check_pixels(f"{form} image", area, 1, bands * (2 * itemsize + 4))


def _npz(file: BinaryIO) -> ArrayFile:
    _check_archive(file)
    try:
        archive = zipfile.ZipFile(file)
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        named = [e for name in _NAMES for e in entries if e.filename == f"{name}.npy"]
        if len(entries) != 1 and not named:
            raise BadImageError(f"NPZ of {len(entries)} arrays: call the one that is meant image")
        entry = (named or entries)[0]
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadImageError("NPZ compressed in an odd way: write it with numpy.savez")
        member = archive.open(entry)
        shape, read = _npy(member, entry.file_size, "NPZ")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError):
        raise BadImageError("a damaged NPZ file") from None
    return ArrayFile("NPZ", shape, read)


def _check_archive(file: BinaryIO) -> None:
    """Raise BadImageError for a directory that ``zipfile`` would fill the memory with."""
    size = file.seek(0, io.SEEK_END)
    tail = max(0, size - _EOCD.size - 0xFFFF)
    file.seek(tail)
    content = file.read()
    place = content.rfind(b"PK\5\6")
    if place < 0 or len(content) - place < _EOCD.size or b"PK\6\7" in content[place - 20 : place]:
        raise BadImageError("a damaged NPZ file")
    length = _EOCD.unpack_from(content, place)[5]
    if length > _MOST_DIRECTORY:
        raise BadImageError(f"NPZ with a directory of {length:,} bytes: save one image a file")
    file.seek(0)


# --- TIFF ----------------------------------------------------------------------------------------


def tiff_file(file: BinaryIO) -> ArrayFile:
    """The first image of a TIFF file, of any number of bands; or, where each of several images has
    one band, all of them as bands of one.

    Raises BadImageError without the package tifffile, and for what it can't read within bounds.
    """
    try:
        import tifffile
    except ImportError:
        raise BadImageError(
            "TIFF of bands that Pillow has no mode for: pip install tifffile"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a line for each oddity of a file
    count = headers.count_directories(file, MOST_BANDS, _MOST_SEGMENTS)
    file.seek(0)
    file = io.BytesIO(file.read())  # tifffile takes no file without a name
    try:
        pages = tifffile.TiffFile(file).pages
        page = pages.first
        stacked = count > 1 and page.samplesperpixel == 1
        chosen = [pages[i] for i in range(count)] if stacked else [page]
        kind, bands = page.dtype, len(chosen) * page.samplesperpixel
        height, width = page.imagelength, page.imagewidth
    except Exception:  # it raises almost anything on a damaged file
        raise BadImageError("a damaged TIFF file") from None
    if page.planarconfig not in (_PIXELS, _PLANES):  # tifffile reads fewer planes than it makes
        raise BadImageError("a damaged TIFF file")
    if kind is None or page.imagedepth != 1 or page.photometric == _PALETTE:
        raise BadImageError("TIFF of an odd kind: save uint8, uint16 or floats, without a palette")
    if any(
        (p.shape, p.dtype, p.compression) != (page.shape, kind, page.compression) for p in chosen
    ):
        raise BadImageError(f"TIFF of {count} images of several kinds: save one a file")
    _check_kind(kind, "TIFF")
    first = stacked or page.planarconfig == _PLANES
    shape = (bands, height, width) if first else (height, width, bands)
    if not 0 < bands <= MOST_BANDS:
        raise BadImageError(f"TIFF of {bands:,} bands: more than {MOST_BANDS:,}")
    _check_shape(shape, kind.itemsize, "TIFF")
    for each in chosen:
        _check_segments(file, each)
    if page.predictor == _FLOAT_PREDICTOR and importlib.util.find_spec("imagecodecs") is None:
        raise BadImageError(
            "TIFF of floats with a predictor of its own: pip install imagecodecs, or save it "
            "without a predictor"
        )

    def read() -> np.ndarray:
        try:
            return np.stack([p.asarray(maxworkers=1) for p in chosen]).reshape(shape)
        except Exception:  # as above
            raise BadImageError("a damaged TIFF file") from None

    return ArrayFile("TIFF", shape, read, "first" if first else "last")


def _check_segments(file: BinaryIO, page: Any) -> None:
    """Raise BadImageError for strips or tiles that hold more than the image has use for, or are too
    few for it: what they don't cover would be whatever stood in memory."""
    if min(len(page.dataoffsets), len(page.databytecounts)) < math.prod(page.chunked):
        raise BadImageError("a damaged TIFF file: it lacks strips or tiles")
    if page.compression not in _PLAIN_TIFF:
        name = getattr(page.compression, "name", page.compression)
        raise BadImageError(f"TIFF of many bands compressed by {name}: save it with deflate")
    if _PLAIN_TIFF[page.compression] != "deflate":
        return
    for place, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        if _INFLATED * length <= _UNCHECKED:
            continue
        file.seek(place)
        try:
            inflated = zlib.decompressobj().decompress(file.read(length), page.nbytes + 1)
        except zlib.error:
            raise BadImageError("a damaged TIFF file") from None
        if len(inflated) > page.nbytes:
            raise BadImageError("a TIFF file whose strips hold more than the image")
