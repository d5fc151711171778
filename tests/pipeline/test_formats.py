"""pipeline/formats.py: which files are images, and what reading some of them takes."""

import io
import re
import subprocess

import pytest
from PIL import Image
from tiny_sets import noise

from pipeline import arrays, dicom, formats
from pipeline.decoding import BadImageError, decode, decode_tensor, is_transparent
from pipeline.formats import (
    EXTENSIONS,
    FORMATS,
    SERVED,
    UNREADABLE,
    is_image,
    package_for,
    readable,
    what_it_is,
)
from tools.torture import hostile_images


def encoded(form):
    buffer = io.BytesIO()
    Image.fromarray(noise(0)).save(buffer, form)
    return buffer.getvalue()


def test_every_extension_is_of_a_format_that_pillow_or_a_package_reads():
    """By Pillow's own table of them."""
    Image.init()
    known = Image.registered_extensions()
    heif = {".heic", ".heif", ".hif"}
    numbers = {*arrays.EXTENSIONS, *dicom.EXTENSIONS}
    assert {e for e in EXTENSIONS if e not in known} <= heif | numbers
    assert {known[e] for e in EXTENSIONS - heif - numbers} <= set(Image.OPEN)
    assert not EXTENSIONS & UNREADABLE
    assert all(extension == extension.lower() for extension in EXTENSIONS | UNREADABLE)


def test_a_missing_package_is_named(monkeypatch):
    Image.init()
    without = {form: opener for form, opener in Image.OPEN.items() if form not in ("HEIF", "AVIF")}
    monkeypatch.setattr(Image, "OPEN", without)
    assert package_for(".heic") == package_for(".hif") == "pillow-heif"
    assert package_for(".avif") == "pillow-avif-plugin" and package_for(".jpg") is None
    monkeypatch.setattr(Image, "ID", list(without))
    with pytest.raises(BadImageError, match="HEIC needs a package: pip install pillow-heif"):
        decode(io.BytesIO(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"))


def test_heic_is_read_where_the_package_is_there(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 30, 40))
    pillow_heif.from_pillow(image).save(tmp_path / "x.HEIC", quality=95)
    assert package_for(".heic") is None
    found = decode(str(tmp_path / "x.HEIC"))
    assert found.size == (64, 48)
    assert all(abs(a - b) < 4 for a, b in zip(found.getpixel((5, 5)), (200, 30, 40), strict=True))


def test_avif_is_read_by_pillow_itself():
    assert decode(io.BytesIO(encoded("AVIF"))).size == (24, 20)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer.*lfs pull",
        ),
        (b"\n<!DOCTYPE HTML><html>", "an HTML page"),
        (b'<?xml version="1.0"?><svg/>', "an XML file or SVG"),
        (b"8BPS\0\1\0\0", "a Photoshop file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"PK\3\4", "a zip archive"),
        (b"hello", "not an image that Pillow can read"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, what):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BadImageError, match=what):
        decode(str(tmp_path / "x.jpg"))
    assert re.match(what, what_it_is(io.BytesIO(content)))


def test_images_are_recognised_under_any_name(tmp_path):
    (tmp_path / "n02085620_10074").write_bytes(encoded("JPEG"))
    (tmp_path / "notes").write_text("these are notes")
    assert is_image(tmp_path / "n02085620_10074")
    assert not is_image(tmp_path / "notes") and not is_image(tmp_path / "nothing")
    assert formats.is_image(tmp_path) is False


def test_other_formats_of_pillow_are_refused_by_name(tmp_path, monkeypatch):
    """Whatever the file is called; and Ghostscript isn't started."""

    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    makers = hostile_images.REFUSED
    for name in ("EPS", "EPS, binary", "WMF", "FITS", "MPEG", "XBM", "ICO", "DDS", "SGI"):
        (tmp_path / "x.jpg").write_bytes(makers[name](0))
        for read in (decode, decode_tensor, is_transparent):
            with pytest.raises(BadImageError, match=f"{name.partition(',')[0]} format, not read"):
                read(tmp_path / "x.jpg")
        assert not is_image(tmp_path / "x.jpg")


def test_the_allowed_formats_are_those_of_the_extensions():
    """By Pillow's own table of them; and what the service answers is a part."""
    Image.init()
    known = Image.registered_extensions()
    assert {known[e] for e in EXTENSIONS if e in known} | {"HEIF"} == set(FORMATS)
    assert set(SERVED) < set(FORMATS) and set(readable()) <= set(Image.OPEN)
