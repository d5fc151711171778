"""pipeline/jpeg.py and the parts of JPEG files, against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from augmentation.crops import resize
from pipeline import jpeg
from pipeline.dataset import ImageDataset
from pipeline.decoding import BadImageError, JpegParts, decode, decode_tensor, open_parts
from pipeline.headers import check_jpeg
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import FileSource
from samplers import EvalSampler

simplejpeg = pytest.importorskip("simplejpeg")
PHOTOGRAPH = load_sample_images().images[0]  # (427, 640, 3)
pytestmark = pytest.mark.filterwarnings("error")


def saved(pixels=PHOTOGRAPH, mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def turned(turn: int, pixels=PHOTOGRAPH) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return saved(pixels, exif=exif)


def by_pillow(content: bytes, factor: int = 1) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        image.draft(None, (width // factor, height // factor))
        return np.array(image.convert("RGB"))


def kinds() -> dict[str, bytes]:
    """Files of every kind that programs write, of odd sizes."""
    odd = np.ascontiguousarray(PHOTOGRAPH[:231, :317])
    files = {
        f"sampled {sampling}": simplejpeg.encode_jpeg(odd, 90, colorsubsampling=sampling)
        for sampling in ("444", "422", "420", "440", "411", "Gray")
    }
    return files | {
        "restarts": saved(odd, restart_marker_blocks=7),
        "restarts in rows": saved(odd, restart_marker_rows=1, subsampling=2),
        "progressive": saved(odd, progressive=True),
        "coarse": saved(odd, quality=5),
        "grey": saved(odd, "L"),
        "RGB with Adobe's marker": saved(odd, keep_rgb=True),
        "CMYK": saved(odd, "CMYK"),
        "YCCK": saved(odd, "CMYK").replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
        "one pixel": saved(odd[:1, :1]),
        "one row": saved(odd[:1]),
        "one MCU and a bit": saved(odd[:17, :17], subsampling=2),
        "whole MCUs": saved(odd[:64, :48], subsampling=2),
    }


@pytest.mark.parametrize("installed", [True, False])
def test_pixels_are_pillows_at_every_size(installed, monkeypatch):
    if not installed:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert jpeg.is_fast() == installed
    for name, content in kinds().items():
        whole = decode_tensor(io.BytesIO(content))
        assert np.array_equal(whole.permute(1, 2, 0), by_pillow(content)), name
        for factor in jpeg.FACTORS:
            short = min(whole.shape[1:]) // factor
            if "K" in name or short < 1:
                continue  # four colours: as a whole
            smaller = decode_tensor(io.BytesIO(content), short_side=short)
            assert smaller.shape[1] == -(-whole.shape[1] // factor), name
            assert np.array_equal(smaller.permute(1, 2, 0), by_pillow(content, factor)), name


def test_a_colour_space_that_adobe_marks_is_one():
    """The files above are what they are called."""
    ycck = kinds()["YCCK"]
    assert check_jpeg(ycck).components == 4 and ycck != kinds()["CMYK"]
    assert not np.array_equal(by_pillow(ycck), by_pillow(kinds()["CMYK"]))


def test_rows_above_the_last_wanted_one_are_the_images():
    for name, content in kinds().items():
        frame = check_jpeg(content)
        for factor in (1, *jpeg.FACTORS):
            whole = jpeg.decode(content, frame, factor)
            if whole is None or min(frame.height, frame.width) < 16:
                continue
            for rows in range(1, len(whole) + 1, 7):
                part = jpeg.decode(content, frame, factor, rows)
                assert np.array_equal(part[:rows], whole[:rows]), (name, factor, rows)
                saves = frame.at_once and (rows + 4) * factor < frame.height
                assert (len(part) < len(whole)) == saves


def test_the_smallest_part_of_the_size_that_is_enough():
    for height, width, least, factor in (
        (447, 900, 224, 1),
        (448, 900, 224, 2),
        (900, 895, 224, 2),
        (900, 896, 224, 4),
        (4000, 1792, 224, 8),
        (4000, 8000, 32, 8),
    ):
        assert jpeg.factor_for(height, width, least) == factor


def waves() -> np.ndarray:
    """As large as the photograph, and smooth: half a pixel of difference shows."""
    rows, columns = np.mgrid[:427, :640]
    values = [np.sin(rows / 9), np.sin(columns / 8), np.sin((rows + 2 * columns) / 20)]
    return (128 + 110 * np.stack(values, 2)).astype(np.uint8)


@pytest.mark.parametrize("turn", range(1, 9))
def test_parts_lie_in_the_upright_image(turn):
    content = turned(turn, waves())
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    parts = open_parts(io.BytesIO(content))
    assert parts.size == expected.shape[:2]
    for box in ((0, 0, *parts.size), (3, 10, 301, 333), (120, 5, 256, 300), (96, 200, 77, 31)):
        top, left, height, width = box
        exact = expected[top : top + height, left : left + width]
        cut = parts.part(box)
        assert cut.inner is None and np.array_equal(cut.pixels.permute(1, 2, 0), exact)
        # At a part of its size: from places between pixels.
        small = resize(parts.part(box, 60), (60, 60), "bicubic")
        resized = resize(cut, (60, 60), "bicubic")
        assert (small.int() - resized.int()).abs().float().mean() < 1, box


def test_what_is_read_of_a_part_is_as_little_as_it_can_be(monkeypatch):
    asked, real = [], jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *args: asked.append(args[2:]) or real(*args))
    parts = open_parts(io.BytesIO(saved()))
    assert isinstance(parts, JpegParts)
    parts.part((8, 16, 128, 256), 64)
    parts.part((8, 16, 127, 256), 64)
    parts.part((8, 16, 128, 256))
    assert asked == [(2, 68), (1, 135), (1, 136)]


def test_a_file_that_somebody_opened_is_read_in_parts_too(tmp_path):
    """As Hugging Face's package gives files of a folder."""
    (tmp_path / "a.jpg").write_bytes(saved())
    with open(tmp_path / "a.jpg", "rb") as file:
        file.read(100)
        assert isinstance(open_parts(file), JpegParts)
        assert torch.equal(decode_tensor(file), decode_tensor(io.BytesIO(saved())))
    with open("/dev/zero", "rb") as file, pytest.raises(BadImageError, match="not an image file"):
        open_parts(file)


def test_damaged_files_have_the_same_reason_whatever_part_is_wanted():
    whole = saved()
    start = check_jpeg(whole).scan_at
    for content in (whole[: len(whole) // 2], whole[:-2], whole[: start + 20], whole[: start + 2]):
        with pytest.raises(BadImageError) as expected:
            decode(content)
        for least in (None, 32):
            with pytest.raises(BadImageError) as found:
                open_parts(io.BytesIO(content)).part((0, 0, 64, 64), least)
            assert str(found.value) == str(expected.value)
    # Pillow takes a file that is damaged within: so do parts.
    spoilt = bytearray(whole)
    spoilt[start + 5000 : start + 5040] = bytes(40)
    found = open_parts(io.BytesIO(bytes(spoilt))).part((0, 0, 427, 640))
    assert np.array_equal(found.pixels.permute(1, 2, 0), by_pillow(bytes(spoilt)))


def test_files_of_several_images_and_with_more_behind_them():
    more = saved() + b"\0" * 1000 + saved(PHOTOGRAPH[::2, ::2])
    expected = torch.from_numpy(by_pillow(saved())[10:60, 20:90]).permute(2, 0, 1)
    assert torch.equal(open_parts(io.BytesIO(more)).part((10, 20, 50, 70)).pixels, expected)


def test_a_loader_says_what_would_be_faster(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(saved())
    dataset = ImageDataset(FileSource(tmp_path, ["a.jpg"], [0], ["one"]))
    loader = Loader(dataset, EvalSampler(1), LoaderSettings(batch_size=1))
    assert "simplejpeg" not in loader.introduction()
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert loader.introduction() == f"0 workers, JPEG files decoded by Pillow ({jpeg.HINT})"
