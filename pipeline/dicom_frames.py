"""Compressed images in DICOM files (PS3.5, annexes A.4 and G): what reads them, and what their own
headers ask for, which is compared with the file's before a decoder believes it."""

import io
import re
import struct
from typing import Any, BinaryIO, NamedTuple

from pipeline import headers
from pipeline.limits import BadImageError, check_pixels

INSTEAD = "write it uncompressed, with gdcmconv --raw"
PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_JPEG, _JPEG_LS, _JPEG_2000, _RLE = "JPEG", "JPEG-LS", "JPEG 2000", "RLE"
_AFTER_MARK = 132
_MOST_META = 1 << 16
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_UID = re.compile(rb"[0-9.]{0,64}")
_SYNTAX = b"\x02\x00\x10\x00"
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_MOST_PARTS = 1 << 16
_SLACK = 1 << 20  # bytes that a frame may be longer than twice its pixels
_EXPANDED = 64  # bytes at most of one byte of RLE
_MOST_PADDING = 1 << 10  # bytes that a segment of RLE may be too long
_UNCHECKED = 64 << 20  # bytes that a segment of RLE may become without being looked at
_COST = 40.0  # bytes of memory per pixel and sample, of numbers of 32 bits on their way


class Syntax(NamedTuple):
    """A way to compress."""

    name: str
    form: str
    packages: str
    """What pip is to install; nothing where pydicom and Pillow read all of it."""
    frames: tuple[int, ...] = ()
    """JPEG's markers of the frames it may have."""
    colours: tuple[str, ...] = ("RGB",)


_BY_LIBJPEG, _BY_OPENJPEG = "pylibjpeg pylibjpeg-libjpeg", "pylibjpeg pylibjpeg-openjpeg"
_YBR, _OF_JPEG_2000 = ("RGB", "YBR_FULL", "YBR_FULL_422"), ("RGB", "YBR_ICT", "YBR_RCT")
_OF_JPEG = "1.2.840.10008.1.2.4."
SYNTAXES = {
    "1.2.840.10008.1.2.5": Syntax("RLE Lossless", _RLE, "", (), ("RGB", "YBR_FULL")),
    f"{_OF_JPEG}50": Syntax("JPEG Baseline", _JPEG, "", (0xC0,), _YBR),
    f"{_OF_JPEG}51": Syntax("JPEG Extended", _JPEG, _BY_LIBJPEG, (0xC0, 0xC1), _YBR),
    f"{_OF_JPEG}57": Syntax("JPEG Lossless", _JPEG, _BY_LIBJPEG, (0xC3,)),
    f"{_OF_JPEG}70": Syntax("JPEG Lossless", _JPEG, _BY_LIBJPEG, (0xC3,)),
    f"{_OF_JPEG}80": Syntax("JPEG-LS Lossless", _JPEG_LS, "pyjpegls", (0xF7,)),
    f"{_OF_JPEG}81": Syntax("JPEG-LS", _JPEG_LS, "pyjpegls", (0xF7,)),
    f"{_OF_JPEG}90": Syntax("JPEG 2000 Lossless", _JPEG_2000, _BY_OPENJPEG, (), _OF_JPEG_2000),
    f"{_OF_JPEG}91": Syntax("JPEG 2000", _JPEG_2000, _BY_OPENJPEG, (), _OF_JPEG_2000),
    **{
        f"{_OF_JPEG}{number}": Syntax("HTJ2K", _JPEG_2000, _BY_OPENJPEG, (), _OF_JPEG_2000)
        for number in (201, 202, 203)
    },
}


def transfer_syntax(file: BinaryIO) -> Syntax | None:
    """How the image of a DICOM file is compressed, None for not at all.

    Read here, and not by pydicom, which would inflate what is deflated, however long it gets.

    Raises BadImageError for what isn't read, with what helps: a package or another program.
    """
    file.seek(_AFTER_MARK)
    uid = _uid_of(file.read(_MOST_META))
    if uid in PLAIN:
        return None
    syntax = SYNTAXES.get(uid)
    if syntax is None:
        what = f"compressed (transfer syntax {uid})" if uid else "without a transfer syntax"
        raise BadImageError(f"DICOM {what}: {INSTEAD}")
    from pydicom.pixels import get_decoder

    if not get_decoder(uid).is_available:
        raise BadImageError(
            f"DICOM compressed as {syntax.name}: pip install {syntax.packages}, or {INSTEAD}"
        )
    return syntax


def _uid_of(meta: bytes) -> str:
    """The transfer syntax in a file's meta group (PS3.10, 7.1), explicit and little-endian; the
    last one, which is also the one that pydicom goes by."""
    uid, place = b"", 0
    while meta.startswith(b"\x02\x00", place) and len(meta) >= place + 12:
        kind = meta[place + 4 : place + 6]
        if not (kind.isalpha() and kind.isupper()):
            raise BadImageError("a damaged DICOM file, or one without an image")
        start = place + (12 if kind in _LONG else 8)
        length = int.from_bytes(meta[start - 4 if kind in _LONG else start - 2 : start], "little")
        if meta.startswith(_SYNTAX, place):
            uid = meta[start : start + length]
        place = start + length
    if place + 12 > len(meta) and len(meta) == _MOST_META:
        raise BadImageError(f"DICOM of more than {_MOST_META:,} bytes before its data set")
    uid = uid.rstrip(b"\0 ")
    if not _UID.fullmatch(uid):
        raise BadImageError("a damaged DICOM file: no transfer syntax")
    return uid.decode()


def check_frame(found: Any, syntax: Syntax) -> None:
    """Check the one frame of a data set, and leave no other in it.

    Raises BadImageError where its own header isn't of the size, depth and number of samples that
    the data set has, and for what would fill the memory as it is decoded.
    """
    from pydicom.encaps import encapsulate

    height, width, samples = int(found.Rows), int(found.Columns), int(found.SamplesPerPixel)
    bits = int(found.BitsAllocated)
    check_pixels("DICOM image", width, height, _COST * samples)
    frame = _joined(found.PixelData)
    if len(frame) > 2 * height * width * samples * bits // 8 + _SLACK:
        raise BadImageError(f"DICOM of {len(frame):,} compressed bytes, more than its pixels have")
    if syntax.form == _RLE:
        _check_rle(frame, height * width, samples * bits // 8)
    else:
        check = _check_codestream if syntax.form == _JPEG_2000 else _check_jpeg
        own = check(frame, syntax)
        if own[:3] != (height, width, samples) or own[3] > bits:
            rows, columns, number, depth = own
            raise BadImageError(
                f"DICOM of {height}×{width}×{samples} in {bits} bits, whose {syntax.name} holds "
                f"{rows}×{columns}×{number} in {depth}"
            )
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if name in found:
            delattr(found, name)
    found.PixelData = encapsulate([frame], has_bot=False)
    found["PixelData"].is_undefined_length = True


def _joined(encapsulated: bytes) -> bytes:
    """The fragments of the one frame, in one (PS3.5, A.4)."""
    parts, place = [], 0
    while encapsulated.startswith(_ITEM, place):
        length = int.from_bytes(encapsulated[place + 4 : place + 8], "little")
        place += 8
        parts.append(encapsulated[place : place + length])
        place += length
        if place > len(encapsulated) or len(parts) > _MOST_PARTS:
            raise BadImageError("a damaged DICOM file: compressed data of odd or too many parts")
    if encapsulated[place:] and not encapsulated.startswith(_END, place):
        raise BadImageError("a damaged DICOM file: something else among its compressed data")
    return b"".join(parts[1:])  # the first says where the others are


def _check_rle(frame: bytes, pixels: int, planes: int) -> None:
    """PS3.5, G.5: the number of segments and where each begins."""
    count, *starts = struct.unpack("<16L", frame[:64].ljust(64, b"\0"))
    if count != planes:
        raise BadImageError(f"DICOM of {planes} planes, whose RLE has {count}")
    ends = [*starts[1:count], len(frame)]
    for start, end in zip(starts, ends, strict=False):
        if not 64 <= start < end <= len(frame):
            raise BadImageError("a damaged DICOM file: RLE segments that overlap or lie outside")
        if _EXPANDED * (end - start) > max(_UNCHECKED, 2 * pixels):
            _check_segment(frame[start:end], pixels)


def _check_segment(segment: bytes, pixels: int) -> None:
    """Raise BadImageError for a segment that becomes more than the image (PS3.5, G.3.2)."""
    place = made = 0
    while place < len(segment):
        head = segment[place]
        place += head + 2 if head < 128 else 2 if head > 128 else 1
        made += head + 1 if head < 128 else 257 - head if head > 128 else 0
        if made > pixels + _MOST_PADDING:
            raise BadImageError("DICOM whose RLE segments hold more than the image")


def _check_jpeg(frame: bytes, syntax: Syntax) -> tuple[int, int, int, int]:
    """Height, width, samples and bits of a JPEG or JPEG-LS image (ITU-T T.81, B.2.2; T.87, C.2)."""
    damaged = BadImageError(f"a damaged DICOM file: no image in {syntax.name}")
    if not frame.startswith(b"\xff\xd8\xff"):
        raise damaged
    if syntax.form == _JPEG:
        headers.check_jpeg(frame)
    sizes, place = [], 2
    while frame[place + 1 : place + 2] != b"\xda":
        if place + 4 > len(frame) or frame[place] != 0xFF:
            raise damaged
        marker = frame[place + 1]
        if marker == 0xFF:  # a byte that fills
            place += 1
            continue
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xCC) or marker == 0xF7:
            if marker not in syntax.frames or sizes:
                raise BadImageError(
                    f"DICOM in {syntax.name} of another kind than it says: {INSTEAD}"
                )
            sizes.append(struct.unpack(">BHHB", frame[place + 4 : place + 10].ljust(6, b"\0")))
        place += 2 + max(2, int.from_bytes(frame[place + 2 : place + 4]))
    if not sizes:
        raise damaged
    bits, height, width, samples = sizes[0]
    return height, width, samples, bits


def _check_codestream(frame: bytes, syntax: Syntax) -> tuple[int, int, int, int]:
    """As :func:`_check_jpeg`, of a JPEG 2000 image (ITU-T T.800, A.5.1)."""
    if not frame.startswith(headers.CODESTREAM) or len(frame) < 45:
        raise BadImageError(f"a damaged DICOM file: no image in {syntax.name}")
    headers.check_jpeg2000(io.BytesIO(frame))
    right, bottom, left, top = struct.unpack_from(">4L", frame, 8)
    (samples,) = struct.unpack_from(">H", frame, 40)
    parts = [frame[place : place + 3] for place in range(42, 42 + 3 * samples, 3)]
    if len({*parts}) != 1 or parts[0][1:] != b"\x01\x01":
        raise BadImageError(f"DICOM whose samples differ in {syntax.name}: {INSTEAD}")
    return bottom - top, right - left, samples, (parts[0][0] & 0x7F) + 1
