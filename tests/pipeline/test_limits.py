"""pipeline/limits.py and pipeline/headers.py: what asks for too much is refused beforehand."""

import io
import os
import resource
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import noise

from pipeline.decoding import decode, decode_tensor, is_transparent
from pipeline.formats import open_image
from pipeline.limits import (
    MOST_FILE_BYTES,
    MOST_SCANS,
    BadImageError,
    TooLargeError,
    limit_pixels,
    most_pixels,
)
from tools.torture import hostile_images


@pytest.fixture
def small_limit():
    """A limit of 10,000 pixels."""
    before = most_pixels()
    limit_pixels(10_000)
    yield
    limit_pixels(before)


DECODERS_OF_FILES = (decode, decode_tensor, is_transparent)


def refused(content, *readers):
    """Why each of the readers refuses a file; the reasons are the same."""
    reasons = set()
    for read in readers or (decode, decode_tensor):
        with pytest.raises(BadImageError) as error:
            read(io.BytesIO(content))
        reasons.add(str(error.value))
    (reason,) = reasons
    return reason


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "sparse", "/dev/zero", "/proc/stat"])
def test_only_files_of_a_bounded_size_are_opened(tmp_path, kind):
    """At once: nobody writes to the pipe, and the devices have no end."""
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(MOST_FILE_BYTES + 1)
    elif kind != "socket":
        path.symlink_to(kind)
    what = {"sparse": "at most 1 GiB", "/dev/zero": "a device", "/proc/stat": "an empty file"}
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            server.bind(os.path.relpath(path))
        for read in DECODERS_OF_FILES:
            with pytest.raises(BadImageError, match=what.get(kind, f"a {kind}")):
                read(path)
    if kind == "sparse":
        with path.open("rb") as file, pytest.raises(BadImageError, match="at most 1 GiB"):
            decode(file)


ASKING_FOR_TOO_MUCH = {
    "JPEG: progressive, 65,500²": "must be read whole",
    "JPEG: several scans, 65,500 × 65,500": "must be read whole",
    "JPEG: frame behind a marker without length": "not an image",
    "JPEG: two frames": "must be read whole",
    "JPEG: 4,000 scans, at the limit": "more than 64 scans",
    "JPEG: EXIF tags over and over": "tags take 325,000,000 bytes",
    "JPEG: a million empty comments": "65,536 parts",
    "PNG: 1 bit, 65,500²": "4,290,250,000 pixels",
    "PNG: 200,000 empty chunks": "65,536 chunks",
    "PNG: a piece of 4 GB": "a PNG chunk of 4,294,967,295 bytes",
    "TIFF: tiles of 40,000² in 64²": "TIFF tile",
    "TIFF: tags over and over, big-endian": "TIFF directory",
    "GIF, frame 65,535² in 8²": "4,294,836,225 pixels",
    "GIF, a comment of 500,000 blocks": "8,192 blocks",
    "BMP, upside down": "17,179,869,184 pixels",
    "TGA, 65,535²": "4,294,836,225 pixels",
    "PPM, a comment of 20 MB": "over 16 MiB",
    "WebP, canvas 16,384²": "WebP image of 16,384×16,384",
    "JPEG 2000, 65,535 tiles": "65,535 tiles",
    "JPEG 2000, 16,384 components": "16384 components",
}


@pytest.mark.parametrize("name", ASKING_FOR_TOO_MUCH)
def test_what_asks_for_too_much_is_refused_by_its_header(name):
    """Before any of it is there: this process may have little more memory than it has."""
    content = dict(hostile_images.files())[name](10_000)
    usual = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    Image.init()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (96 << 20), usual[1]))
    try:
        assert ASKING_FOR_TOO_MUCH[name] in refused(content)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_of_ordinary_files_are_few(progressive):
    """Also where a film hangs on behind the image, in which the marker occurs by chance."""
    image = Image.fromarray(noise(0, 64, 64))
    for mode in ("L", "RGB", "CMYK"):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "JPEG", progressive=progressive)
        content = buffer.getvalue()
        assert content.count(b"\xff\xda") <= 18
        more = content + b"\xff\xda" * 1000
        assert torch.equal(decode_tensor(io.BytesIO(more)), decode_tensor(io.BytesIO(content)))
        assert np.array_equal(decode(more), decode(content))


def test_as_many_scans_as_are_allowed():
    for scans, allowed in ((MOST_SCANS, True), (MOST_SCANS + 1, False)):
        content = hostile_images.many_scans(16, 0)
        content = hostile_images.many_scans(16, scans - content.count(b"\xff\xda"))
        assert content.count(b"\xff\xda") == scans
        if allowed:
            assert decode(content).size == (16, 16)
        else:
            assert "more than 64 scans" in refused(content)


def test_the_limit_holds_for_every_format(small_limit):
    for form in ("PNG", "GIF", "TIFF", "BMP", "PPM", "TGA", "WEBP", "JPEG2000", "AVIF"):
        for side, allowed in ((50, True), (101, False)):
            buffer = io.BytesIO()
            Image.new("RGB", (side, side)).save(buffer, form)
            if allowed:
                assert decode(buffer.getvalue()).size == (side, side), form
            else:
                assert "limit of 10,000 pixels" in refused(buffer.getvalue()), form
                with pytest.raises(TooLargeError), open_image(buffer):
                    pass


def test_a_jpeg_is_read_at_the_largest_part_that_is_allowed(small_limit):
    """1/8 of 800 × 800 is allowed, of 900 × 900 not."""
    for side, left in ((100, 100), (101, 51), (200, 100), (201, 51), (401, 51), (800, 100)):
        content = hostile_images.jpeg("RGB", side, side)
        assert decode(content).size == (left, left)
        assert decode_tensor(io.BytesIO(content)).shape == (3, left, left)
    assert "900×900 pixels: more than" in refused(hostile_images.jpeg("RGB", 900, 900))
