"""Image files that mean harm, made by code: small on disk, large in what they ask for.

A maker gets the limit of pixels, and returns the file's bytes. Those that ask for just as much as
the limit allows show what decoding takes at most.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

Maker = Callable[[int], bytes]


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _side(limit: int) -> int:
    """Of the largest square that the limit allows."""
    return math.isqrt(limit)


def _square(form: str, mode: str, **options: object) -> Maker:
    """A black image at the limit."""
    return lambda n: _saved(Image.new(mode, (_side(n), _side(n))), form, **options)


# --- JPEG (ITU-T T.81) ----------------------------------------------------------------------------


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg(mode: str, width: int, height: int, **options: object) -> bytes:
    """A JPEG file of few bytes whose header says ``width`` × ``height``."""
    content = bytearray(_saved(Image.new(mode, (16, 16), 0), "JPEG", **options))
    place = next(
        content.find(bytes((0xFF, m))) for m in (0xC0, 0xC2) if bytes((0xFF, m)) in content
    )
    struct.pack_into(">HH", content, place + 5, height, width)
    return bytes(content)


def _before_frame(content: bytes, what: bytes) -> bytes:
    """``what`` put in behind the first marker of a file."""
    return content[:2] + what + content[2:]


def _in_several_scans(limit: int) -> bytes:
    """Not progressive, but its first scan holds one component of three."""
    content = jpeg("RGB", _side(limit), _side(limit), subsampling=0)
    place = content.index(b"\xff\xda")
    header = _segment(0xDA, b"\x01\x01\x00\x00\x3f\x00")
    return content[:place] + header + content[place + 14 :]


def many_scans(side: int, scans: int) -> bytes:
    """A progressive file whose scans are repeated."""
    content = jpeg("RGB", side, side, progressive=True)
    places = [i for i in range(len(content)) if content.startswith(b"\xff\xda", i)]
    scan = content[places[-1] : -2]
    return content[:-2] + scan * scans + b"\xff\xd9"


def tags_over_and_over(tags: int, size: int, order: str = "<") -> bytes:
    """A TIFF directory whose ``tags`` all have the same ``size`` bytes for their value."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8)
    entries = [struct.pack(order + "HHLL", 5000 + i, 7, size, 8) for i in range(tags)]
    directory = struct.pack(order + "H", tags) + b"".join(entries) + bytes(4)
    return (head + directory).ljust(8 + size, b"\0")


def _hidden_frame(_: int) -> bytes:
    """A marker without a length, behind which a careless reader finds a small frame."""
    small = _segment(0xC0, struct.pack(">BHHB", 8, 8, 8, 1) + b"\x01\x11\x00")
    cover = b"\xff\x01" + struct.pack(">H", len(small) + 2)
    return _before_frame(jpeg("L", 65500, 65500), cover + small)


def _exif_bomb(_: int) -> bytes:
    exif = b"Exif\0\0" + tags_over_and_over(5000, 65000)[:65500]
    return _before_frame(jpeg("RGB", 16, 16), _segment(0xE1, exif))


def _index_bomb(_: int) -> bytes:
    index = b"MPF\0" + tags_over_and_over(5000, 65000)[:65500]
    return _before_frame(jpeg("RGB", 16, 16), _segment(0xE2, index))


def _two_frames(_: int) -> bytes:
    small = _segment(0xC0, struct.pack(">BHHB", 8, 8, 8, 1) + b"\x01\x11\x00")
    return _before_frame(jpeg("L", 65500, 65500), small)


JPEGS: dict[str, Maker] = {
    "grey, 65,500²": lambda _: jpeg("L", 65500, 65500),
    "colour, 65,500²": lambda _: jpeg("RGB", 65500, 65500),
    "progressive, 65,500²": lambda _: jpeg("L", 65500, 65500, progressive=True),
    "progressive, at the limit": lambda n: jpeg(
        "RGB", _side(n), _side(n), progressive=True, subsampling=0
    ),
    "progressive CMYK, at the limit": lambda n: jpeg("CMYK", _side(n), _side(n), progressive=True),
    "several scans, at the limit": _in_several_scans,
    "several scans, 65,500 × 65,500": lambda _: _in_several_scans(65500**2),
    "frame behind a marker without length": _hidden_frame,
    "two frames": _two_frames,
    "height 0": lambda _: jpeg("L", 65500, 0),
    "one row": lambda _: jpeg("RGB", 65500, 1),
    "64 scans, at the limit": lambda n: many_scans(_side(n), 54),
    "4,000 scans, at the limit": lambda n: many_scans(_side(n), 4000),
    "200,000 scans of 16 × 16": lambda _: many_scans(16, 200_000),
    "EXIF tags over and over": _exif_bomb,
    "MPF tags over and over": _index_bomb,
    "a million empty comments": lambda _: _before_frame(
        jpeg("RGB", 16, 16), _segment(0xFE, b"") * 1_000_000
    ),
    "a million bytes of filling": lambda _: _before_frame(jpeg("RGB", 16, 16), b"\xff" * 1_000_000),
    "eight million bytes of rubbish": lambda _: _before_frame(
        jpeg("RGB", 16, 16), b"\xff\x00" * 4_000_000
    ),
    "progressive and turned, at the limit": lambda n: jpeg(
        "RGB", _side(n), _side(n), exif=_orientation(5), progressive=True, subsampling=0
    ),
}


def _orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


# --- PNG (ISO/IEC 15948) --------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", check)


def _zeros(count: int, times: int = 1) -> bytes:
    """``count × times`` zero bytes, compressed."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(count)) for _ in range(times)]
    return b"".join(parts) + packer.flush()


# Samples per pixel by colour type.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png(
    width: int, height: int, bits: int, colour: int, *chunks: bytes, data: bytes | None = None
) -> bytes:
    """A black PNG; with ``data`` in place of its pixels."""
    header = struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0)
    row = 1 + -(-width * bits * _SAMPLES[colour] // 8)
    pixels = _zeros(row, height) if data is None else data
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _square_png(bits: int, colour: int, *chunks: bytes) -> Maker:
    return lambda n: png(_side(n), _side(n), bits, colour, *chunks)


_TEXT = _chunk(b"zTXt", b"a\0\0" + _zeros(1 << 20, 60))
_GREY = _chunk(b"tRNS", b"\0\0")
_PALETTE = (_chunk(b"PLTE", bytes(768)), _chunk(b"tRNS", bytes(256)))
_TURN = _chunk(b"eXIf", _orientation(5)[6:])

PNGS: dict[str, Maker] = {
    "1 bit, 65,500²": lambda _: png(65500, 65500, 1, 0, data=b""),
    "2³¹-1 × 2³¹-1": lambda _: png(2**31 - 1, 2**31 - 1, 8, 2, data=b""),
    "grey, at the limit": _square_png(8, 0),
    "1 bit, at the limit": _square_png(1, 0),
    "RGBA, turned, at the limit": _square_png(8, 6, _TURN),
    "grey and alpha of 16 bits, at the limit": _square_png(16, 4, _TURN),
    "RGBA of 16 bits, at the limit": _square_png(16, 6),
    "grey of 16 bits with a transparent one, at the limit": _square_png(16, 0, _GREY, _TURN),
    "palette with transparency, turned, at the limit": _square_png(8, 3, *_PALETTE, _TURN),
    "colour with a transparent one, at the limit": _square_png(8, 2, _chunk(b"tRNS", bytes(6))),
    "interlaced rows missing": lambda n: png(_side(n), _side(n), 8, 2, data=_zeros(8)),
    "profile of 60 MB": lambda _: png(8, 8, 8, 2, _chunk(b"iCCP", b"a\0\0" + _zeros(1 << 20, 60))),
    "text of 60 MB": lambda _: png(8, 8, 8, 2, _TEXT),
    "text of 1 MB, a hundred times": lambda _: png(
        8, 8, 8, 2, *[_chunk(b"zTXt", b"%d\0\0" % i + _zeros(1 << 20)) for i in range(100)]
    ),
    "EXIF tags over and over": lambda _: png(
        8, 8, 8, 2, _chunk(b"eXIf", tags_over_and_over(60_000, 1 << 20))
    ),
    "raw EXIF tags over and over": lambda _: png(8, 8, 8, 2, _raw_exif()),
    "60,000 empty chunks": lambda _: png(8, 8, 8, 2, _chunk(b"teST", b"") * 60_000),
    "200,000 empty chunks": lambda _: png(8, 8, 8, 2, _chunk(b"teST", b"") * 200_000),
    "200,000 empty pieces of pixels": lambda _: png(8, 8, 8, 2, _chunk(b"IDAT", b"") * 200_000),
    "a piece of 4 GB": lambda _: png(8, 8, 8, 2)[:-12] + struct.pack(">L4s", 2**32 - 1, b"IDAT"),
    "pixels of 1 GB in a small image": lambda _: png(8, 8, 8, 2, data=_zeros(1 << 20, 1 << 10)),
}


def _raw_exif() -> bytes:
    exif = tags_over_and_over(30_000, 380_000).hex().encode()
    text = b"\n\nexif\n%d\n" % len(exif) + exif
    return _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


# --- TIFF -----------------------------------------------------------------------------------------


def tiff(entries: Iterable[tuple[int, int, int, int]], data: bytes = b"", at: int = 8) -> bytes:
    """A little-endian TIFF of (tag, type, count, value) whose ``data`` begin at byte 8."""
    entries = sorted(entries)
    head = b"II*\0" + struct.pack("<L", 8 + len(data))
    body = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return head + data + struct.pack("<H", len(entries)) + body + bytes(4)


def _tiff_of(
    width: int, height: int, bits: int, *more: tuple[int, int, int, int], data: bytes
) -> bytes:
    """Grey, in one Deflate strip unless ``more`` says otherwise."""
    base = {
        256: (256, 4, 1, width),
        257: (257, 4, 1, height),
        258: (258, 3, 1, bits),
        259: (259, 3, 1, 8),
        262: (262, 3, 1, 1),
        273: (273, 4, 1, 8),
        277: (277, 3, 1, 1),
        278: (278, 4, 1, height),
        279: (279, 4, 1, len(data)),
    }
    return tiff((base | {entry[0]: entry for entry in more}).values(), data)


def _tile_bomb(_: int) -> bytes:
    tiles = ((322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, 64))
    return _tiff_of(64, 64, 8, *tiles, data=_zeros(64))


def _square_tiff(bits: int, *more: tuple[int, int, int, int]) -> Maker:
    def make(limit: int) -> bytes:
        side = _side(limit)
        return _tiff_of(side, side, bits, *more, data=_zeros(side * bits // 8, side))

    return make


def _deep_rgba_tiff(limit: int) -> bytes:
    side = _side(limit)
    data = _zeros(side * 8, side)
    bits = struct.pack("<4H", 16, 16, 16, 16)
    more = ((258, 3, 4, 8 + len(data)), (262, 3, 1, 2), (277, 3, 1, 4), (338, 3, 1, 2))
    return _tiff_of(side, side, 16, *more, data=data + bits)


TIFFS: dict[str, Maker] = {
    "grey of 16 bits, at the limit": _square_tiff(16),
    "grey of 32 bits, at the limit": _square_tiff(32, (339, 3, 1, 2)),
    "floats, at the limit": _square_tiff(32, (339, 3, 1, 3)),
    "CMYK, at the limit": _square("TIFF", "CMYK", compression="tiff_lzw"),
    "RGBA, at the limit": _square("TIFF", "RGBA", compression="tiff_adobe_deflate"),
    "RGBA of 16 bits, at the limit": _deep_rgba_tiff,
    "LAB, at the limit": _square("TIFF", "LAB", compression="tiff_adobe_deflate"),
    "JPEG inside, at the limit": _square("TIFF", "YCbCr", compression="jpeg"),
    "2³²-1 × 2³²-1": lambda _: _tiff_of(2**32 - 1, 2**32 - 1, 8, data=b"x"),
    "tiles of 40,000² in 64²": _tile_bomb,
    "a strip of 1 GB in 64²": lambda _: _tiff_of(64, 64, 8, data=_zeros(1 << 20, 1 << 10)),
    "rows per strip 2³²-1": lambda _: _tiff_of(
        64, 64, 8, (278, 4, 1, 2**32 - 1), data=_zeros(4096)
    ),
    "60,000 samples per pixel": lambda _: _tiff_of(64, 64, 8, (277, 3, 1, 60_000), data=b"x"),
    "tags over and over": lambda _: tags_over_and_over(60_000, 1 << 20),
    "tags over and over, big-endian": lambda _: tags_over_and_over(60_000, 1 << 20, ">"),
    "a tag of 4 GB": lambda _: _tiff_of(64, 64, 8, (700, 1, 2**32 - 1, 8), data=_zeros(64)),
    "a million strips": lambda _: _tiff_of(
        64, 64, 8, (273, 4, 1_000_000, 8), (279, 4, 1_000_000, 8), data=bytes(4_000_000)
    ),
}


# --- other formats --------------------------------------------------------------------------------


def _gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    """Of a canvas, and a first frame of another size."""
    content = bytearray(_saved(Image.new("P", (8, 8)), "GIF"))
    struct.pack_into("<HH", content, 6, width, height)
    struct.pack_into("<HH", content, content.index(b"\x2c\0\0\0\0") + 5, *frame)
    return bytes(content)


def _bmp(width: int, height: int, *, header: int = 40, bits: int = 8, packed: int = 0) -> bytes:
    fields = struct.pack("<LllHHLLllLL", header, width, height, 1, bits, packed, 0, 1, 1, 0, 0)
    body = fields + bytes(1024)
    return b"BM" + struct.pack("<LHHL", 14 + len(body), 0, 0, 14 + len(body)) + body


def _packed_bmp(limit: int) -> bytes:
    """All rows in runs of 255 pixels."""
    side = _side(limit)
    row = b"\xff\x07" * (side // 255) + bytes((side % 255, 7)) + b"\0\0"
    return _bmp(side, side, packed=1) + row * side + b"\0\1"


def _tga(width: int, height: int) -> bytes:
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 32, 8) + bytes(4)


def _gif_comments(count: int, size: int, text: bytes = b"a") -> bytes:
    """``count`` comments of ``size`` blocks each."""
    block = bytes([len(text)]) + text
    content = _saved(Image.new("P", (8, 8)), "GIF")
    place = content.index(b"\x2c\0\0\0\0")
    return content[:place] + (b"\x21\xfe" + block * size + b"\0") * count + content[place:]


def _webp_canvas(width: int, height: int) -> bytes:
    frames = [Image.new("RGBA", (16, 16), colour) for colour in ("red", "blue")]
    content = bytearray(_saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(
        3, "little"
    )
    return bytes(content)


def _webp(mode: str) -> Maker:
    """As large as libwebp makes them, or as the limit allows for what they cost."""

    def make(limit: int) -> bytes:
        side = min(16383, _side(int(limit * 0.48)))
        return _saved(Image.new(mode, (side, side)), "WEBP", lossless=True, quality=0, method=0)

    return make


def _jpeg2000(width: int, height: int, tile: tuple[int, int], components: int = 3) -> bytes:
    content = bytearray(_saved(Image.new("RGB", (16, 16)), "JPEG2000", no_jp2=True))
    place = content.index(b"\xff\x51")
    struct.pack_into(">8LH", content, place + 6, width, height, 0, 0, *tile, 0, 0, components)
    return bytes(content)


def _real_jpeg2000(mode: str) -> Maker:
    def make(limit: int) -> bytes:
        weight = (5.5 * len(Image.new(mode, (1, 1)).getbands()) + 4) / 12
        side = _side(int(limit / max(1.0, weight)))
        return _saved(Image.new(mode, (side, side)), "JPEG2000")

    return make


def _of_boxes(form: str, mode: str, **options: object) -> Maker:
    def make(limit: int) -> bytes:
        side = _side(int(limit * 0.4))
        return _saved(Image.new(mode, (side, side)), form, **options)

    return make


def _avif_exif(_: int) -> bytes:
    exif = b"Exif\0\0" + tags_over_and_over(20_000, 300_000)
    return _saved(Image.new("RGB", (16, 16)), "AVIF", exif=exif)


OTHERS: dict[str, Maker] = {
    "GIF, canvas 65,535²": lambda _: _gif(65535, 65535, (8, 8)),
    "GIF, frame 65,535² in 8²": lambda _: _gif(8, 8, (65535, 65535)),
    "GIF, at the limit": _square("GIF", "P"),
    "GIF, 200,000 comments": lambda _: _gif_comments(200_000, 1),
    "GIF, a comment of 500,000 blocks": lambda _: _gif_comments(1, 500_000),
    "GIF, 5,000 full blocks of a comment": lambda _: _gif_comments(1, 5_000, b"a" * 255),
    "BMP, 2³¹-1 × 2³¹-1": lambda _: _bmp(2**31 - 1, 2**31 - 1),
    "BMP, header of 2³²-1": lambda _: _bmp(8, 8, header=2**32 - 1),
    "BMP, upside down": lambda _: _bmp(8, -(2**31)),
    "BMP in runs, at the limit": _packed_bmp,
    "TGA, 65,535²": lambda _: _tga(65535, 65535),
    "TGA in runs, at the limit": _square("TGA", "RGBA", compression="tga_rle"),
    "PPM, 10⁹ × 10⁹": lambda _: b"P6 1000000000 1000000000 255\n",
    "PPM as text, at the limit": lambda n: (
        b"P3 %d %d 255\n" % (_side(n), _side(n)) + b"1 " * 200_000
    ),
    "PPM of 254 greys, at the limit": lambda n: (
        b"P6 %d %d 254\n" % (_side(n), _side(n)) + bytes(4_000_000)
    ),
    "PGM of 16 bits, at the limit": lambda n: (
        b"P5 %d %d 65535\n" % (_side(n), _side(n)) + bytes(4_000_000)
    ),
    "PPM, a comment of 1 MB": lambda _: b"P6 #" + bytes(1 << 20),
    "PPM, a comment of 20 MB": lambda _: b"P6 #" + bytes(20 << 20),
    "WebP, canvas 16,384²": lambda _: _webp_canvas(16384, 16384),
    "WebP, canvas 2²⁴ × 2²⁴": lambda _: _webp_canvas(1 << 24, 1 << 24),
    "WebP, at the limit": _webp("RGB"),
    "WebP with alpha, at the limit": _webp("RGBA"),
    "JPEG 2000, 65,535 tiles": lambda _: _jpeg2000(65535, 1, (1, 1)),
    "JPEG 2000, 16,384 components": lambda _: _jpeg2000(16, 16, (16, 16), 16384),
    "JPEG 2000, 2³²-1 × 2³²-1": lambda _: _jpeg2000(2**32 - 1, 2**32 - 1, (2**32 - 1, 2**32 - 1)),
    "JPEG 2000, grey, at the limit": _real_jpeg2000("L"),
    "JPEG 2000, colour, at the limit": _real_jpeg2000("RGB"),
    "JPEG 2000 with alpha, at the limit": _real_jpeg2000("RGBA"),
    "AVIF, at the limit": _of_boxes("AVIF", "RGB", speed=10, subsampling="4:4:4"),
    "AVIF with alpha, at the limit": _of_boxes("AVIF", "RGBA", speed=10, subsampling="4:4:4"),
    "AVIF, EXIF tags over and over": _avif_exif,
}


# --- what is no image, or none that is read -------------------------------------------------------

REFUSED: dict[str, Maker] = {
    "EPS": lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n",
    "EPS, binary": lambda _: b"\xc5\xd0\xd3\xc6" + struct.pack("<LL", 32, 8) + bytes(64),
    "WMF": lambda _: b"\xd7\xcd\xc6\x9a" + bytes(64),
    "EMF": lambda _: b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(64),
    "PDF": lambda _: b"%PDF-1.7\n",
    "PSD": lambda _: b"8BPS\0\1" + bytes(64),
    "FITS": lambda _: b"SIMPLE  = T".ljust(2880),
    "MPEG": lambda _: b"\0\0\1\xb3" + bytes(64),
    "XBM": lambda _: b"#define a_width 60000\n#define a_height 60000\nstatic char a_bits[] = {\n",
    "XPM": lambda _: b"/* XPM */\nstatic char * a[] = {\n",
    "FLI": lambda _: struct.pack("<LHHHH", 128, 0xAF11, 9, 60000, 60000) + bytes(128),
    "ICO": lambda _: _saved(Image.new("RGB", (16, 16)), "ICO"),
    "ICNS": lambda _: b"icns" + bytes(64),
    "DDS": lambda _: b"DDS " + bytes(124),
    "PCX": lambda _: _saved(Image.new("RGB", (16, 16)), "PCX"),
    "SGI": lambda _: _saved(Image.new("RGB", (16, 16)), "SGI"),
    "zip archive": lambda _: b"PK\3\4" + bytes(64),
    "noise": lambda _: np.random.RandomState(0).bytes(4096),
    "zeros": lambda _: bytes(4096),
    "text": lambda _: b"not an image",
}

GROUPS = {"JPEG": JPEGS, "PNG": PNGS, "TIFF": TIFFS, "": OTHERS, "not read": REFUSED}


def files() -> Iterator[tuple[str, Maker]]:
    """All of them, with their names."""
    for group, makers in GROUPS.items():
        for name, make in makers.items():
            yield f"{group}: {name}" if group else name, make
