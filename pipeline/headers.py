"""Headers of image files: what they ask for, found before a decoder believes it.

Pillow's parsers read whole headers into memory and hand the pixels to native decoders. What is
checked here is what those would allocate or do without a look at Pillow's limit of pixels.
"""

import io
import re
import struct
import sys
from typing import BinaryIO, NamedTuple

from pipeline.limits import (
    BYTES_PER_PIXEL,
    MOST_SCANS,
    MOST_SLOW_BYTES,
    BadImageError,
    check_pixels,
)

JPEG = b"\xff\xd8\xff"
# Pillow reads the last two as well.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")
_EXIF = b"Exif\0\0"
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_SOS, _EOI, _DHT, _DAC, _DQT, _DRI, _COM = 0xDA, 0xD9, 0xC4, 0xCC, 0xDB, 0xDD, 0xFE
_KNOWN = _SOF | {_SOS, _DHT, _DAC, _DQT, _DRI, _COM, *range(0xE0, 0xF0)}
# In coded data FF is followed by 00, or is a restart marker (ITU-T T.81, B.1.1.5).
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_UNIT_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_UNIT_BYTES |= {16: 8, 17: 8, 18: 8}
_ORIENTATION = 0x0112
_ENTRIES = {b"II*\0": struct.Struct("<HHLL"), b"MM\0*": struct.Struct(">HHLL")}
_TILE_SIDES = (322, 323)
_SEGMENT_TAGS = (273, 279, 324, 325)  # where strips and tiles are, and their lengths
_VALUE = {12: 4, 20: 8}  # bytes of an entry that hold its value, by the bytes of the entry
_MOST_PARTS = 1 << 16  # segments or chunks, which Pillow reads one by one
_SMALL_PART = 256  # bytes
_MOST_BLOCKS = 1 << 13  # of a GIF: the work of Pillow grows with the square of their number
_QUICK_PPM = re.compile(rb"P(4\s+\d+\s+\d+|5\s+\d+\s+\d+\s+(255|65535)|6\s+\d+\s+\d+\s+255)\s")
_MOST_TAGS = 1 << 16  # a number of a tag has two bytes
_SLACK = 1 << 16  # bytes by which the values of tags may overlap
_SIZ = struct.Struct(">4s4x8LH")
CODESTREAM = b"\xff\x4f\xff\x51"
_MOST_TILES = 1 << 14  # of a JPEG 2000 image, times its components: each takes kilobytes
_MOST_BOXES = 1 << 10
_MOST_EXIF = 16  # chance finds the four bytes once in 2 GiB


class Frame(NamedTuple):
    """What a JPEG file says of its pixels."""

    width: int
    height: int
    components: int
    at_once: bool
    """One scan holds all there is, so that decoding needs the memory of a few rows."""
    height_at: int = 0
    """Where the two bytes of the height are."""
    scan_at: int = 0
    """Where the first scan begins."""
    turn: int = 0
    """EXIF's orientation, 1 to 8; 0 for none."""


def check_jpeg(content: bytes) -> Frame | None:
    """The frame of a JPEG file (ITU-T T.81, B.2); None where its header isn't an ordinary one.

    Raises BadImageError for more scans than MOST_SCANS, and metadata that fill the memory or take
    for ever.
    """
    frame: Frame | None = None
    exif: list[bytes] = []
    place, certain, xmp = 2, True, False
    parts, end = 0, len(content) - 3
    while place < end:
        parts += 1
        if content[place] != 0xFF:
            certain = False
            rubbish = place
            place = content.find(b"\xff", place, end)
            if place < 0:
                return None
            parts += place - rubbish
        if parts > _MOST_PARTS:
            raise BadImageError(f"a JPEG whose header has more than {_MOST_PARTS:,} parts")
        marker = content[place + 1]
        if marker == 0xFF:  # a byte that fills
            place += 1
            continue
        if marker == _EOI:
            return None
        if marker not in _KNOWN:  # without a length, or of no frame that is decoded
            certain = False
            place += 2
            continue
        length = max(2, content[place + 2] << 8 | content[place + 3])
        if marker == _SOS:
            break
        if marker in _SOF:
            certain = certain and frame is None and length >= 8
            frame = _frame(content[place + 4 : place + 10], marker, place + 5)
        elif marker == 0xE1 and content.startswith(_EXIF, place + 4):
            exif.append(content[place + 10 : place + 2 + length])
        elif marker == 0xE1:  # XMP, where Pillow looks for the orientation as well
            xmp = xmp or content.find(b"Orientation", place, place + 2 + length) >= 0
        place += 2 + length
    else:
        return None
    turn = check_exif(b"".join(exif)) if exif else 0
    certain = certain and len(exif) <= 1 and turn is not None and not (xmp and turn == 0)
    if frame is None:
        return None
    frame = frame._replace(scan_at=place, turn=turn or 0)
    in_scan = content[place + 4] if place + 4 < len(content) else 0
    if not frame.at_once or in_scan < frame.components:
        frame = frame._replace(at_once=False)
        _check_scans(content, place)
    return frame if certain else None


def _frame(header: bytes, marker: int, height_at: int) -> Frame | None:
    if len(header) < 6:
        return None
    height, width, components = struct.unpack(">xHHB", header)
    return Frame(width, height, components, marker not in _PROGRESSIVE, height_at)


def _check_scans(content: bytes, place: int) -> None:
    """Raise BadImageError if the work of decoding is many times that of an image."""
    # Never too few; too many where a thumbnail or a film hangs on, so it is looked at more closely.
    if content.count(bytes((0xFF, _SOS)), place) <= MOST_SCANS:
        return
    scans = 0
    while found := _MARKER.search(content, place):
        marker = content[found.start() + 1]
        if marker == _EOI:
            return
        scans += marker == _SOS
        if scans > MOST_SCANS:
            raise BadImageError(
                f"a JPEG of more than {MOST_SCANS} scans, each of which is as much work as the "
                "whole image: save it again"
            )
        length = content[found.end() : found.end() + 2]
        place = found.end() + int.from_bytes(length)


def check_tags(file: BinaryIO) -> None:
    """Look at the first directory of a TIFF file, or of EXIF data, which have the same form.

    Raises BadImageError where its values overlap so much that reading them fills the memory.
    """
    base = 0
    while file.read(len(_EXIF)) == _EXIF:
        base += len(_EXIF)
    file.seek(base)
    head = file.read(16)
    if not head.startswith(TIFF):
        return
    size = file.seek(0, io.SEEK_END) - base
    order = "<" if head.startswith(b"II") else ">"
    big = head[2:3] == b"+"
    entry = struct.Struct(order + ("HHQ8x" if big else "HHL4x"))
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "L"), head, 8 if big else 4)
        if start >= size:
            return
        file.seek(base + start)
        (count,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    except struct.error:
        return
    directory = file.read(min(count, _MOST_TAGS) * entry.size)
    whole = len(directory) // entry.size * entry.size
    if count > _MOST_TAGS and whole == len(directory):
        raise BadImageError(f"a TIFF directory of {count:,} tags")
    sizes = (n * _UNIT_BYTES.get(kind, 0) for _, kind, n in entry.iter_unpack(directory[:whole]))
    total = sum(each for each in sizes if each <= size)  # others can't be read
    _check_tile(order, directory[:whole], entry.size)
    if total > size + _SLACK:
        raise BadImageError(f"a TIFF directory whose tags take {total:,} bytes of {size:,}")


def count_directories(file: BinaryIO, most: int, most_segments: int) -> int:
    """How many images a TIFF file holds, at least 1 (TIFF 6.0, section 2; BigTIFF).

    Raises BadImageError for more than ``most``, and for directories of one whose tags fill the
    memory: more than ``most_segments`` strips or tiles, or MOST_SLOW_BYTES of other values.
    """
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head.startswith(b"II") else ">", head[2:3] == b"+" or head[3:4] == b"+"
    number, place = (
        struct.Struct(order + ("Q" if big else "H")),
        struct.Struct(order + ("Q" if big else "L")),
    )
    entry = struct.Struct(order + ("HHQ8x" if big else "HHL4x"))
    try:
        (start,) = place.unpack_from(head, 8 if big else 4)
        for count in range(most + 1):
            if not start:
                return max(1, count)
            file.seek(start)
            (tags,) = number.unpack(file.read(number.size))
            if tags > _MOST_TAGS:
                break
            _check_directory(file.read(tags * entry.size), entry, most_segments)
            (start,) = place.unpack(file.read(place.size))
    except (struct.error, OSError, OverflowError):
        raise BadImageError("a damaged TIFF file") from None
    raise BadImageError(f"a TIFF file of more than {most:,} images, or of odd ones")


def _check_directory(directory: bytes, entry: struct.Struct, most_segments: int) -> None:
    total = 0
    for tag, kind, number in entry.iter_unpack(directory):
        if tag in _SEGMENT_TAGS:
            if number > most_segments:
                raise BadImageError(f"a TIFF image of {number:,} strips or tiles")
        else:
            total += number * _UNIT_BYTES.get(kind, 0)
    if total > MOST_SLOW_BYTES:
        raise BadImageError(f"a TIFF directory whose tags take {total:,} bytes")


def check_exif(exif: bytes) -> int | None:
    """The orientation in EXIF data, 0 for none; None where readers may find different ones.

    Raises BadImageError as ``check_tags``.
    """
    exif = exif.removeprefix(_EXIF)
    entry = _ENTRIES.get(exif[:4])
    start = 2 + int.from_bytes(exif[4:8], "little" if exif[:1] == b"I" else "big")
    if entry is not None and start <= len(exif):
        (count,) = struct.unpack_from(entry.format[:1] + "H", exif, start - 2)
        directory = exif[start : start + 12 * count]
        if len(directory) == 12 * count:
            turn = _plain_orientation(entry, directory, len(exif))
            if turn is not None:
                return turn
    check_tags(io.BytesIO(exif))
    return None


def _plain_orientation(entry: struct.Struct, directory: bytes, size: int) -> int | None:
    """The one orientation, of the usual form, of a directory in ``size`` bytes that hold all of its
    values; 0 for none, None for any other directory."""
    turn = total = 0
    for tag, kind, number, place in entry.iter_unpack(directory):
        length = number * _UNIT_BYTES.get(kind, 0)
        if length > 4:
            total += length
            if place + length > size:
                return None
        if tag == _ORIENTATION:
            value = (place if entry.format[0] == "<" else place >> 16) & 0xFFFF
            if turn or kind != 3 or number != 1 or not 1 <= value <= 8:
                return None
            turn = value
    return turn if total <= size + _SLACK else None


def _check_tile(order: str, directory: bytes, step: int) -> None:
    """Raise BadImageError for a tile that is larger than images are."""
    sides = {}
    for place in range(0, len(directory), step):
        (tag, kind) = struct.unpack_from(order + "HH", directory, place)
        if tag in _TILE_SIDES:
            form = "H" if kind == 3 else "L"
            (sides[tag],) = struct.unpack_from(order + form, directory, place + step - _VALUE[step])
    if len(sides) == len(_TILE_SIDES):
        check_pixels("TIFF tile", *(sides[tag] for tag in _TILE_SIDES), 2 * BYTES_PER_PIXEL)


def check_png(file: BinaryIO) -> None:
    """Raise BadImageError for chunks without number, or far longer than the file (ISO/IEC 15948,
    5.3): for what is left of one, Pillow would ask for as much memory."""
    size = file.seek(0, io.SEEK_END)
    file.seek(8)
    parts = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">L4s", head)
        parts += length < _SMALL_PART or kind not in (b"IDAT", b"fdAT")
        if parts > _MOST_PARTS:
            raise BadImageError(f"a PNG of more than {_MOST_PARTS:,} chunks")
        if file.seek(length + 4, io.SEEK_CUR) > size + _SLACK:
            raise BadImageError(f"is cut off: a PNG chunk of {length:,} bytes, a file of {size:,}")


def check_ppm(head: bytes, file: BinaryIO) -> None:
    """Raise BadImageError for a large file that Pillow reads value by value."""
    if not _QUICK_PPM.match(head) and file.seek(0, io.SEEK_END) > MOST_SLOW_BYTES:
        raise BadImageError(
            f"a PPM file of over {MOST_SLOW_BYTES >> 20} MiB with text, a comment or an odd "
            "maximum, which takes minutes to read: convert it to PNG"
        )


def check_gif(file: BinaryIO) -> None:
    """Raise BadImageError for blocks without number before the first frame (GIF 89a, 15 to 24)."""
    file.seek(10)
    flags = file.read(3)[:1] or b"\0"
    if flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, io.SEEK_CUR)
    blocks = 0
    while (kind := file.read(1)) not in (b"", b",", b";"):
        blocks += 1
        if kind == b"!":
            file.seek(1, io.SEEK_CUR)
            while (size := file.read(1)) not in (b"", b"\0") and blocks <= _MOST_BLOCKS:
                blocks += 1
                file.seek(size[0], io.SEEK_CUR)
        if blocks > _MOST_BLOCKS:
            raise BadImageError(f"a GIF with over {_MOST_BLOCKS:,} blocks before its pixels")


def check_webp(head: bytes) -> None:
    """Raise BadImageError for too large a canvas, which libwebp allocates when it is opened."""
    kind, data = head[12:16], head[20:30]
    if len(data) < 10:
        return
    if kind == b"VP8X":
        size = (1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little"))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        size = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    else:
        width, height = struct.unpack_from("<HH", data, 6)
        size = (width & 0x3FFF, height & 0x3FFF)
    check_pixels("WebP image", *size, COST["WEBP"])


def check_jpeg2000(file: BinaryIO) -> None:
    """Raise BadImageError for tiles and components that fill the memory (ITU-T T.800, A.5.1)."""
    file.seek(_codestream(file))
    header = file.read(_SIZ.size)
    if len(header) < _SIZ.size:
        return
    marker, x1, y1, x0, y0, tile_x, tile_y, tile_x0, tile_y0, components = _SIZ.unpack(header)
    width, height = x1 - x0, y1 - y0
    if marker != CODESTREAM or width <= 0 or height <= 0 or not tile_x or not tile_y:
        raise BadImageError("a damaged JPEG 2000 image")
    tiles = -(-(x1 - tile_x0) // tile_x) * -(-(y1 - tile_y0) // tile_y)
    if not 0 < tiles * components <= _MOST_TILES or components > 4:
        raise BadImageError(f"a JPEG 2000 image of {tiles:,} tiles of {components} components")
    # OpenJPEG holds a tile as 32-bit numbers.
    share = min(1.0, tile_x * tile_y / (width * height))
    check_pixels("JPEG 2000 image", width, height, 5.5 * components * share + 4)


def _codestream(file: BinaryIO) -> int:
    """Where the image begins in a JP2 file's boxes (ITU-T T.800, I.4), or in a bare one."""
    place = 0
    file.seek(0)
    for _ in range(_MOST_BOXES):
        head = file.read(16)
        if len(head) < 16 or head.startswith(CODESTREAM):
            return place
        length, kind, longer = struct.unpack(">L4sQ", head)
        body = 16 if length == 1 else 8
        if kind == b"jp2c":
            return place + body
        size = max(body, longer if length == 1 else length)
        if kind == b"jp2h" and size > MOST_SLOW_BYTES:
            raise BadImageError(f"a JPEG 2000 file with a header of {size:,} bytes")
        place += size
        file.seek(min(place, sys.maxsize))
    raise BadImageError("a JPEG 2000 file of too many boxes")


def check_exif_within(content: bytes) -> None:
    """Look at all that may be EXIF data in a file of boxes, as AVIF is. Raises BadImageError."""
    for number, found in enumerate(re.finditer(rb"II\*\0|MM\0\*", content)):
        if number == _MOST_EXIF:
            raise BadImageError("damaged: EXIF data over and over")
        check_tags(io.BytesIO(content[found.start() :]))


# Bytes of memory that decoding takes per pixel, where that is more than BYTES_PER_PIXEL: libwebp
# keeps two canvases, the others keep planes of 16 or 32 bits beside their result.
COST = {"WEBP": 25.0, "AVIF": 30.0, "HEIF": 30.0}
