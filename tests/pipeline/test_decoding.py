"""pipeline/decoding.py: every kind of image file as RGB, or the reason why not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import noise, save

from pipeline.decoding import BadImageError, decode, decode_tensor


def test_modes_become_rgb(tmp_path):
    rgb = Image.fromarray(noise(0))
    for mode in ("RGB", "RGBA", "LA", "L", "1", "P"):
        path = tmp_path / f"{mode}.png"
        rgb.convert(mode).save(path)
        expected = rgb.convert(mode).convert("RGB")
        assert np.array_equal(decode(path), expected), mode
    cmyk = tmp_path / "cmyk.jpg"
    rgb.convert("CMYK").save(cmyk)
    assert decode(cmyk).mode == "RGB"


@pytest.mark.filterwarnings("error")
def test_palette_with_transparent_bytes(tmp_path):
    image = Image.fromarray(noise(0)).quantize(4)
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255, 255]))
    assert np.array_equal(decode(tmp_path / "p.png"), image.convert("RGB"))


def test_deep_greys_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray((ramp / 257).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(ramp // 256).save(tmp_path / "dark.png")
    for name in ("16.png", "32.tif", "unit.tif", "float.tif"):
        out = np.asarray(decode(tmp_path / name))
        assert out.shape == (16, 16, 3)
        assert np.abs(out[..., 0].astype(int) - expected).max() <= 1, name
    assert np.asarray(decode(tmp_path / "dark.png")).max() == 1


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(noise(0, 8, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "turned.png"), np.rot90(np.asarray(image), -1))
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (8, 24)
    image.save(tmp_path / "broken.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(tmp_path / "broken.jpg").size == (24, 8)


def test_bad_images_give_their_reason(tmp_path, monkeypatch):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    empty = tmp_path / "empty.png"
    empty.touch()
    cut = save(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-300])
    corrupt = save(tmp_path / "corrupt.png")
    content = bytearray(corrupt.read_bytes())
    content[60:80] = bytes(20)
    corrupt.write_bytes(content)
    for path, reason in (
        (text, "not an image"),
        (empty, "not an image"),
        (cut, "truncated"),
        (corrupt, "."),
        (tmp_path / "absent.jpg", "No such file"),
    ):
        with pytest.raises(BadImageError, match=reason):
            decode(path)
    whole = save(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(BadImageError, match="decompression bomb"):
        decode(whole)


def encoded(mode="RGB", kind="JPEG", **options):
    pixels = np.random.RandomState(0).randint(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


@pytest.mark.parametrize(
    "content",
    [
        encoded(quality=95),
        encoded(quality=40, subsampling=2),
        encoded(quality=90, progressive=True),
        encoded("L"),
        encoded("CMYK"),
        rotated(),
        encoded(kind="PNG"),
        encoded("P", kind="PNG"),
        encoded(kind="WEBP", lossless=True),
    ],
    ids=["plain", "small", "progressive", "grey", "cmyk", "rotated", "png", "palette", "webp"],
)
def test_tensors_hold_the_pixels_that_pillow_reads(content, tmp_path):
    expected = np.asarray(decode(io.BytesIO(content)))
    (tmp_path / "image").write_bytes(content)
    for image in (io.BytesIO(content), str(tmp_path / "image"), tmp_path / "image"):
        tensor = decode_tensor(image)
        assert tensor.dtype == torch.uint8
        # Two builds of libjpeg-turbo may round differently.
        difference = tensor.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)
        assert np.abs(difference).max() <= 2


def test_damaged_images_have_the_same_reasons(tmp_path):
    whole = encoded()
    for content in (whole[: len(whole) // 2], whole[:30], b"\xff\xd8\xffnothing", b"", b"text"):
        with pytest.raises(BadImageError) as expected:
            decode(io.BytesIO(content))
        with pytest.raises(BadImageError) as found:
            decode_tensor(io.BytesIO(content))
        assert str(found.value) == str(expected.value)
    with pytest.raises(BadImageError, match="No such file"):
        decode_tensor(tmp_path / "missing.jpg")


def test_arrays_are_decoded_without_a_copy_in_between():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert torch.equal(decode_tensor(array).permute(1, 2, 0), torch.from_numpy(array))
    assert decode_tensor(array[..., 0]).shape == (3, 4, 4)
