"""pipeline/decoding.py: every kind of image file as RGB, or the reason why not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tiny_sets import noise, save

from pipeline.decoding import (
    BadImageError,
    decode,
    decode_tensor,
    is_transparent,
    naming_lack_of_memory,
)
from pipeline.formats import open_image


def test_modes_become_rgb(tmp_path):
    rgb = Image.fromarray(noise(0))
    for mode in ("RGB", "RGBA", "LA", "L", "1", "P"):
        path = tmp_path / f"{mode}.png"
        rgb.convert(mode).save(path)
        # Opaque, whatever it could be.
        expected = rgb.convert(mode).convert("RGB")
        assert np.array_equal(decode(path), expected), mode
    cmyk = tmp_path / "cmyk.jpg"
    rgb.convert("CMYK").save(cmyk)
    assert decode(cmyk).mode == "RGB"


@pytest.mark.filterwarnings("error")
def test_palette_with_transparent_bytes(tmp_path):
    image = Image.fromarray(noise(0)).quantize(4)
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255, 255]))
    assert np.array_equal(decode(tmp_path / "p.png", "drop"), image.convert("RGB"))
    pixels, place = np.asarray(decode(tmp_path / "p.png")), np.asarray(image)
    colours = np.asarray(image.convert("RGB"))
    assert (pixels[place == 0] == 255).all()
    assert np.abs(pixels[place == 1] - (colours[place == 1] / 2 + 127.5)).max() <= 1
    assert np.array_equal(pixels[place > 1], colours[place > 1])


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
        (empty, "an empty file"),
        (cut, "truncated"),
        (corrupt, "."),
        (tmp_path / "absent.jpg", "No such file"),
    ):
        with pytest.raises(BadImageError, match=reason):
            decode(path)
    whole = save(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(
        BadImageError, match="480 pixels: more than the limit of 400.*--max-image-pixels"
    ):
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
        assert np.array_equal(tensor.permute(1, 2, 0), expected)


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


# --- transparency ---------------------------------------------------------------------------------


def transparent_images() -> dict[str, Image.Image]:
    """An image of noise with noise for alpha, in every mode that has it."""
    rgb = Image.fromarray(noise(0, 12, 9))
    alpha = Image.fromarray(noise(1, 12, 9)[..., 0])
    rgba, la = rgb.copy(), rgb.convert("L")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    return {
        "RGBA": rgba,
        "LA": la,
        "RGBa": rgba.convert("RGBa"),
        "La": la.convert("La"),
        "PA": rgba.quantize(8).convert("PA"),
    }


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))]
)
def test_transparency_is_composited_on_the_background(mode, background, colour):
    image = transparent_images()[mode]
    straight = image.convert("LA") if mode == "La" else image
    pixels = np.asarray(straight.convert("RGBA"), dtype=float)
    share = pixels[..., 3:] / 255
    expected = share * pixels[..., :3] + (1 - share) * np.array(colour)
    given = np.asarray(decode(image, background), dtype=float)
    assert np.abs(given - expected).max() <= 1
    assert torch.equal(
        decode_tensor(image, background).permute(1, 2, 0), torch.from_numpy(given).byte()
    )
    # As timm, whose loader converts.
    dropped = np.asarray(decode(image, "drop"))
    assert np.array_equal(dropped, np.asarray(straight.convert("RGBA"))[..., :3])
    assert is_transparent(image)


@pytest.mark.parametrize(
    ("image", "key", "hidden"),
    [
        (Image.new("RGB", (2, 1), (10, 20, 30)), (10, 20, 30), (10, 20, 30)),
        (Image.new("L", (2, 1), 7), 7, (7, 7, 7)),
        (Image.new("1", (2, 1), 0), 0, (0, 0, 0)),
        (Image.fromarray(np.full((1, 2), 2570, np.uint16)), 2570, (10, 10, 10)),
        (Image.new("P", (2, 1), 0), 0, (0, 0, 0)),
    ],
    ids=["RGB", "L", "1", "I;16", "P"],
)
def test_a_colour_may_stand_for_transparent(image, key, hidden):
    """PNG's tRNS; of grey images of 16 bits too, which Pillow itself leaves alone."""
    image.putpixel((1, 0), {"RGB": (255, 0, 0), "I;16": 65535}.get(image.mode, 1))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=key)
    content = buffer.getvalue()
    assert is_transparent(content)
    for background, colour in (("navy", (0, 0, 128)), ("drop", hidden)):
        pixels = np.asarray(decode(content, background))
        assert tuple(pixels[0, 0]) == colour, background
        assert np.array_equal(pixels[0, 1], np.asarray(decode(image))[0, 1])


def test_what_is_opaque_stays_as_it_is():
    opaque = transparent_images()["RGBA"]
    opaque.putalpha(255)
    assert not is_transparent(opaque)
    assert np.array_equal(decode(opaque, "navy"), opaque.convert("RGB"))
    for image in (Image.fromarray(noise(0)), Image.fromarray(noise(0)).quantize(4)):
        assert not is_transparent(image)


# --- what is decoded ------------------------------------------------------------------------------


def lab(rgb: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "CMYK", "RGBX"])
def test_colour_spaces_come_back_to_rgb(mode):
    smooth = Image.linear_gradient("L").resize((16, 16)).point(lambda x: 90 + x // 4)
    rgb = Image.merge("RGB", (smooth, smooth.rotate(90), smooth.rotate(180)))
    image = lab(rgb) if mode == "LAB" else rgb.convert(mode)
    difference = np.asarray(decode(image), dtype=int) - np.asarray(rgb, dtype=int)
    assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_byte_orders_of_deep_greys(order):
    values = np.array([[0, 32896, 65535]], dtype=order)
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    assert np.asarray(decode(image))[0, :, 0].tolist() == [0, 128, 255]


def test_paths_bytes_files_images_and_arrays_are_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.fromarray(noise(0, 8, 24))
    for kind, name in (("JPEG", "a.jpg"), ("PNG", "a.png"), ("TIFF", "a.tif"), ("WEBP", "a.webp")):
        path = tmp_path / name
        image.save(path, kind, exif=exif)
        expected = np.asarray(decode(path))
        assert expected.shape == (24, 8, 3)
        content = path.read_bytes()
        with path.open("rb") as file, Image.open(path) as lazy, Image.open(path) as opened:
            sources = [str(path), content, bytearray(content), file, lazy, opened.convert("RGB")]
            for source in sources:
                if kind == "TIFF" and source is sources[-1]:
                    continue  # Pillow turns these itself
                assert np.array_equal(decode(source), expected), (kind, type(source))
            # An image that was turned is not turned again, and the user's own stays as it is.
            assert np.array_equal(decode(decode(lazy)), expected)
            assert kind == "TIFF" or lazy.size == (24, 8)
    grey = noise(0)[..., 0]
    for array in (grey, grey[..., None], np.stack([grey] * 3, 2)):
        assert np.array_equal(decode(array), np.stack([grey] * 3, 2))
    with pytest.raises(BadImageError, match="float is none of path, bytes"):
        decode(1.5)


def test_the_frame_that_is_shown_is_decoded():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(buffer.getvalue()))[0, 0].tolist() == [255, 0, 0]
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        image.seek(2)
        assert np.asarray(decode(image))[0, 0].tolist() == [0, 0, 255]


# --- limits ---------------------------------------------------------------------------------------


def test_large_jpegs_are_read_at_a_part_of_their_size_by_both_decoders(monkeypatch, tmp_path):
    image = Image.linear_gradient("L").resize((120, 80)).convert("RGB")
    image.save(tmp_path / "large.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True)
    image.save(tmp_path / "large.png")
    whole = np.asarray(image.resize((60, 40), Image.Resampling.BOX), dtype=int)
    assert decode(tmp_path / "large.jpg").size == (120, 80)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 80 // 2 - 1)  # Pillow refuses twice that
    for path in (tmp_path / "large.jpg", (tmp_path / "large.jpg").read_bytes()):
        given = decode(path)
        assert given.size == (60, 40)
        assert np.abs(np.asarray(given, dtype=int) - whole).max() <= 4
    tensor = decode_tensor(tmp_path / "large.jpg")
    assert np.array_equal(tensor.permute(1, 2, 0), given)
    with open_image(tmp_path / "large.jpg") as header:
        assert header.size == (120, 80)
    for name, reason in (
        ("large.png", "9,600 pixels: more than the limit"),
        ("progressive.jpg", "120×80 pixels"),
    ):
        for read in (decode, decode_tensor):
            with pytest.raises(BadImageError, match=reason):
                read(tmp_path / name)


def test_lack_of_memory_is_a_bad_image(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", no_memory)
    with pytest.raises(BadImageError, match="needs more memory"):
        decode(Image.new("L", (4, 4)))
    with pytest.raises(BadImageError, match="needs more memory"), naming_lack_of_memory():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="of my own"), naming_lack_of_memory():
        raise RuntimeError("of my own")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("background", ["navy", "drop"])
def test_strips_give_the_pixels_of_the_whole(monkeypatch, mode, background):
    rng = np.random.default_rng(0)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(rng.integers(0, 60_000, (23, 17)).astype(kind))
        image.info["transparency"] = int(np.asarray(image)[3, 4])
    elif mode == "P":
        image = Image.fromarray(noise(0, 23, 17)).quantize(8)
        image.info["transparency"] = bytes(range(0, 240, 30))
    else:
        image = Image.fromarray(rng.integers(0, 256, (23, 17, 4), dtype=np.uint8)).convert(mode)
    whole, tensor = decode(image, background), decode_tensor(image, background)
    assert image.mode == mode
    transparent = is_transparent(image)
    for pixels in (1, 40, 200):
        monkeypatch.setattr("pipeline.decoding._STRIP", pixels)
        assert np.array_equal(decode(image, background), whole)
        assert torch.equal(decode_tensor(image, background), tensor)
        assert is_transparent(image) == transparent


def test_an_opened_image_is_turned_as_its_owner_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(exif=exif.tobytes())
    assert decode(content).size == (50, 60)
    with Image.open(io.BytesIO(content)) as image:
        image.getexif()[0x0112] = 1
        assert decode(image).size == (60, 50)


def test_orientation_is_the_same_for_both_decoders():
    """Where EXIF data are odd, or XMP has it."""
    plain = encoded()
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    directory = bytes.fromhex("002a 00000008 0001 0112 0003 00000001 0006 0000 00000000")
    cases = {
        "EXIF": (block, (60, 50)),
        "XMP": (xmp, (60, 50)),
        "not quite EXIF": (b"Exi\xfe\0\0" + block[6:], (50, 60)),
        "of no byte order": (b"\xff" * 8 + directory, (50, 60)),
        "as a long number": (block.replace(b"\x12\0\3\0", b"\x12\0\4\0"), (50, 60)),
    }
    for name, (segment, size) in cases.items():
        head = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
        content = plain[:2] + head + plain[2:]
        shape = decode(content).size[::-1]
        assert decode_tensor(io.BytesIO(content)).shape[1:] == shape, name
        assert shape == size, name


def test_a_file_that_somebody_else_opened_is_of_an_allowed_format():
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with Image.open(io.BytesIO(drawing)) as image, pytest.raises(BadImageError, match="EPS"):
        decode(image)
