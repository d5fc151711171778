"""What hostile clients send to the service: requests, forms, images."""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
IMAGE = b"Content-Type: image/png\r\n"

Requests = dict[str, tuple[bytes, int, bool]]


def png(width: int, height: int) -> bytes:
    """A grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (120, 130, 140)).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG file whose last scan is there ``scans`` times more."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * scans + content[-2:]


@cache
def noisy(side: int) -> bytes:
    """A JPEG file within all limits that takes as long as such a file may."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", progressive=True, quality=50)
    return buffer.getvalue()


@cache
def bomb(width: int, height: int) -> bytes:
    """A PNG file of one colour with a header that tells of many pixels, and all of their rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    packer, row = zlib.compressobj(1), bytes(1 + 8 * width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def request(content: bytes, kind: bytes = b"image/png", path: bytes = b"/predict") -> bytes:
    """A request with a body, as it should be."""
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (path, kind, len(content)) + content


def form(
    content: bytes, kind: bytes = b"multipart/form-data; boundary=cut", part: bytes = b""
) -> bytes:
    """A request with a form of one file; ``part`` replaces the headers of the file."""
    part = part or b'Content-Disposition: form-data; name="file"; filename="a.png"'
    body = b"--cut\r\n%s\r\n\r\n%s\r\n--cut--\r\n" % (part, content)
    return request(body, kind)


CODECS = (b"unicode_escape", b"punycode", b"idna", b"utf-7", b"utf-16", b"hex", b"rot13", b"zlib")
CODECS += (b"raw_unicode_escape", b"undefined", b"mbcs", b"base64", b"\xff", b"", b"x" * 5000)


def requests(image: bytes) -> Requests:
    """By name: a request that is odd or malformed, the status that it deserves (0: the connection
    is closed without one), and whether the connection must be closed after it.

    ``image`` is one that the service answers.
    """
    return {
        **_lengths(image),
        **_codings(image),
        **_heads(image),
        **_queries(image),
        **_forms(image),
        **_odd_forms(image),
    }


def _lengths(image: bytes) -> Requests:
    length = b"Content-Length: %d\r\n" % len(image)
    post = HEAD + IMAGE
    chunked = b"%x\r\n%s\r\n0\r\n" % (len(image), image)
    return {
        "length and transfer coding": (
            post + length + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"\r\n",
            *(400, True),
        ),
        "two lengths": (post + length + b"Content-Length: 5\r\n\r\n" + image, 400, True),
        "the same length twice": (post + length * 2 + b"\r\n" + image, 200, False),
        "a negative length": (post + b"Content-Length: -5\r\n\r\n", 400, True),
        "an odd length": (post + b"Content-Length: 5_0\r\n\r\n", 400, True),
        "a length with a sign": (post + b"Content-Length: +5\r\n\r\n12345", 400, True),
        "a huge length": (post + b"Content-Length: 9999999999999999999\r\n\r\n", 413, True),
        "a length of 5,000 digits": (
            post + b"Content-Length: %s\r\n\r\n" % (b"9" * 5000),
            400,
            True,
        ),
    }


def _codings(image: bytes) -> Requests:
    length = b"Content-Length: %d\r\n" % len(image)
    post = HEAD + IMAGE
    chunked = b"%x\r\n%s\r\n0\r\n" % (len(image), image)
    return {
        "chunks": (post + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"\r\n", 200, False),
        "chunks and trailers": (
            post + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"X-A: b\r\n\r\n",
            *(200, False),
        ),
        "a chunk of an odd size": (
            post + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + image,
            *(400, True),
        ),
        "a negative chunk": (post + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", 400, True),
        "a huge chunk": (
            post + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n" + image,
            *(400, True),
        ),
        "another transfer coding": (post + b"Transfer-Encoding: gzip\r\n\r\n", 400, True),
        "two transfer codings": (post + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400, True),
        "expect": (post + length + b"Expect: 100-continue\r\n\r\n" + image, 200, False),
        "another expectation": (post + length + b"Expect: a miracle\r\n\r\n" + image, 200, False),
        "HTTP/1.0": (
            b"POST /predict HTTP/1.0\r\nContent-Type: image/png\r\n" + length + b"\r\n" + image,
            *(200, True),
        ),
    }


def _heads(image: bytes) -> Requests:
    length = b"Content-Length: %d\r\n" % len(image)
    post = HEAD + IMAGE
    return {
        "HTTP/0.9": (b"GET /health\r\n\r\n", 400, True),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404, False),
        "TLS": (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
            400,
            True,
        ),
        "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400, True),
        "a WebSocket": (
            b"GET /predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
            *(405, False),
        ),
        "CONNECT": (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404, False),
        "HEAD": (b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n", 200, False),
        "OPTIONS": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404, False),
        "TRACE": (b"TRACE /health HTTP/1.1\r\nHost: x\r\n\r\n", 405, False),
        "an odd method": (b"G\x00T /health HTTP/1.1\r\nHost: x\r\n\r\n", 400, True),
        "a whole URL": (b"GET http://x/health HTTP/1.1\r\nHost: x\r\n\r\n", 200, False),
        "bytes in the path": (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400, True),
        "escapes in the path": (
            b"GET /%ff%00%ed%a0%80/../.. HTTP/1.1\r\nHost: x\r\n\r\n",
            404,
            False,
        ),
        "a path of 1 MB": (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 2**20), 400, True),
        "a header of 1 MB": (post + b"X-A: %s\r\n\r\n" % (b"a" * 2**20), 400, True),
        "100,000 headers": (post + b"X-A: b\r\n" * 100_000 + b"\r\n", 400, True),
        "a folded header": (post + length + b"X-A: b\r\n c\r\n\r\n" + image, 200, False),
        "a header without a name": (post + b": b\r\n\r\n", 400, True),
        "a null in a header": (post + b"X-A: \x00\r\n\r\n", 400, True),
    }


def _queries(image: bytes) -> Requests:
    found = {}
    for name, path, status in (
        ("topk of 5,000 digits", b"?topk=" + b"9" * 5000, 422),
        ("topk none", b"?topk=", 422),
        ("topk twice", b"?topk=1&topk=2", 200),
        ("topk of odd digits", b"?topk=%D9%A1%D9%A2", 422),
        ("topk of half a surrogate", b"?topk=%ED%A0%80", 422),
        ("explain odd", b"?explain=maybe", 422),
        ("about odd", b"?explain=true&about=%ff%00%0d%0aX:%20y", 422),
        ("about of 1 MB", b"?explain=true&about=" + b"a" * 2**20, 400),
    ):
        found[name] = (request(image, path=b"/predict" + path), status, status == 400)
    return found


def _forms(image: bytes) -> Requests:
    kind, disposition = b"multipart/form-data; boundary=", b"Content-Disposition: form-data; "
    found = {
        f"charset {codec[:20]!r}": (form(image, kind + b"cut; charset=" + codec), 200, False)
        for codec in CODECS
    }
    inner = b"--in\r\nContent-Type: image/png\r\n\r\n%s\r\n--in--" % image
    for name, sent, status in (
        ("no boundary", form(image, b"multipart/form-data"), 400),
        ("an empty boundary", form(image, kind), 400),
        ("an odd boundary", form(image, kind + b'"\xff \\""'), 400),
        ("another boundary", form(image, kind + b"other"), 400),
        ("a boundary of 20,000 characters", form(image, kind + b"c" * 20_000), 400),
        ("no disposition", form(image, part=b"X: y"), 400),
        ("no headers of the part", request(b"--cut\r\n\r\nx\r\n--cut--", kind + b"cut"), 400),
        ("no file name", form(image, part=disposition + b'name="file"'), 400),
        ("an empty file name", form(image, part=disposition + b'filename=""'), 200),
        ("an odd file name", form(image, part=disposition + b'filename="\xff\x00\x1b[2J"'), 200),
        ("odd field names", form(image, part=disposition + b'name="\xff;"; filename=a'), 200),
        ("an endless quote", form(image, part=disposition + b'filename="a'), 400),
        (
            "a form in a form",
            form(
                inner,
                part=disposition + b"filename=a\r\nContent-Type: multipart/mixed; boundary=in",
            ),
            422,
        ),
    ):
        found[name] = (sent, status, False)
    return found


def _odd_forms(image: bytes) -> Requests:
    kind, disposition = b"multipart/form-data; boundary=", b"Content-Disposition: form-data; "
    found = {}
    for name, sent, status in (
        (
            "base64",
            form(image, part=disposition + b"filename=a\r\nContent-Transfer-Encoding: base64"),
            200,
        ),
        ("headers of 100 kB", form(image, part=b"X-A: " + b"a" * 100_000), 400),
        (
            "1,000 fields",
            request(
                b"--cut\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n" * 1000 + b"--cut--",
                kind + b"cut",
            ),
            400,
        ),
        (
            "1,000 files",
            request(
                b"--cut\r\nContent-Disposition: form-data; filename=a\r\n\r\nb\r\n" * 1000
                + b"--cut--",
                kind + b"cut",
            ),
            400,
        ),
        ("no end", request(b"--cut\r\n%s filename=a\r\n\r\nx" % disposition, kind + b"cut"), 400),
        ("boundaries alone", request(b"\r\n--cut" * 20_000, kind + b"cut"), 400),
        (
            "almost boundaries",
            request(
                b"--cut\r\n%sfilename=a\r\n\r\n%s\r\n--cut--" % (disposition, b"\r\n--cu" * 30_000),
                kind + b"cut",
            ),
            422,
        ),
        ("another kind", request(image, b"text/\xff\x1b[2J"), 415),
    ):
        found[name] = (sent, status, False)
    return found
