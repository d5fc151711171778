"""Bands and 16 bits, kept on disk and packed: the pixels of the files, or what is said of them."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from data_parts import open_part
from PIL import Image

from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Form
from augmentation.transforms import CentreCrop
from config import AugmentOptions
from errors import DataError
from pipeline import kept_pixels
from pipeline.bands import decode_bands
from pipeline.dataset import ImageDataset
from pipeline.disk_cache import DiskOptions, disk_cached
from pipeline.loader import Loader, LoaderSettings
from samplers import EvalSampler, ShuffleSampler
from tools.data.pack import main as pack

SIZE = 50, 60  # height and width of the images
INPUT, SIDE = 24, 28


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    pydicom = pytest.importorskip("pydicom")
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    (image.Rows, image.Columns), image.SamplesPerPixel = pixels.shape[:2], 1
    image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PixelData = (pixels >> 4).tobytes()
    image.save_as(path, enforce_file_format=True)


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


def write_image(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels[..., 0]).save(path)


KINDS = {
    "bands of 16 bits, NPY": (Form(5, 16), ".npy", np.save),
    "bands of 8 bits, TIFF": (Form(4, 8), ".tif", write_tiff),
    "greys of 16 bits, PNG": (Form(1, 16), ".png", write_image),
    "greys, DICOM": (Form(1, 16), ".dcm", write_dicom),
    "greys of 8 bits, PNG": (Form(1, 8), ".png", write_image),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """The form of the images and the folder with 4 for training and 2 for validation, one of them
    no larger than SIDE."""
    form, suffix, write = KINDS[request.param]
    root, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 1)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                size = (26, 40) if (part, name, number) == ("train", "b", 1) else SIZE
                levels = rng.integers(0, form.levels + 1, (*size, form.channels))
                pixels = levels.astype(np.uint8 if form.bit_depth == 8 else np.uint16)
                write(root / part / name / f"{number}{suffix}", pixels)
    return form, root


def shape_of(form: Form) -> Preprocessing:
    values = (0.5,) * form.channels
    return Preprocessing(INPUT, INPUT / SIDE, "bicubic", values, values, bit_depth=form.bit_depth)


def loader_of(dataset: ImageDataset, form: Form, *, is_train: bool = True) -> Loader:
    transform = CentreCrop(shape_of(form))
    if is_train:
        transform = BatchAugment(shape_of(form), AugmentOptions(aa=None, color_jitter=None), 3)
    sampler = (ShuffleSampler if is_train else EvalSampler)(len(dataset))
    return Loader(dataset.with_transform(transform), sampler, LoaderSettings(2, 0))


def pixels_of(loader: Loader) -> torch.Tensor:
    return torch.cat([batch.images for batch in loader])


def options_for(folder: Path, side: int) -> DiskOptions:
    return DiskOptions(str(folder / "cache"), 10**9, side)


def words(form: Form) -> list[str]:
    return ["--in-chans", str(form.channels), "--bit-depth", str(form.bit_depth)]


def by_pillow(bands: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, H, W) resized to (height, width), floats; of 16 bits without bounds."""
    if bands.dtype == np.uint16:
        bands = bands.astype(np.float32)
    images = (Image.fromarray(band).resize(size[::-1], Image.BICUBIC) for band in bands)
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


@pytest.mark.parametrize("is_train", [True, False])
def test_kept_as_they_are_the_pixels_are_those_of_the_files(kind, tmp_path, monkeypatch, is_train):
    form, root = kind
    part = open_part("IMNET", root, is_train)
    want = pixels_of(loader_of(part, form, is_train=is_train))
    cached = disk_cached(loader_of(part, form, is_train=is_train), options_for(tmp_path, 0))
    assert torch.equal(pixels_of(cached), want)
    monkeypatch.setattr(kept_pixels, "decode_bands", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(kept_pixels, "tensor_of", lambda *_, **__: torch.zeros(1, *SIZE))
    again = disk_cached(loader_of(part, form, is_train=is_train), options_for(tmp_path, 0))
    assert torch.equal(pixels_of(again), want)


def test_smaller_ones_are_resized_as_everywhere_and_packed_so(kind, tmp_path):
    """To the levels that Pillow rounds to, but for the last digit."""
    form, root = kind
    part = open_part("IMNET", root)
    source = disk_cached(loader_of(part, form), options_for(tmp_path, SIDE)).dataset.source
    argv = ["--data-path", str(root), "--output-dir", str(tmp_path / "raw"), *words(form)]
    assert pack([*argv, "--format", "raw", "--short-side", str(SIDE)]) == 0
    packed = open_part("raw/x", tmp_path / "raw").source
    for number in range(4):
        kept = source.open(number)
        assert np.array_equal(source.open(number), kept)  # from the file
        assert np.array_equal(packed.open(number), kept)
        whole = decode_bands(part.source.open(number), form).numpy()
        if number == 3:
            assert np.array_equal(kept, whole.transpose(1, 2, 0))
            continue
        want = by_pillow(whole, (SIDE, int(SIDE * 60 / 50))).transpose(1, 2, 0)
        assert kept.shape == want.shape and kept.dtype == whole.dtype
        assert np.abs(kept - want.clip(0, form.levels)).max() <= 1


def test_evaluation_of_packed_images_of_its_size_is_exact(kind, tmp_path):
    form, root = kind
    argv = ["--data-path", str(root), "--output-dir", str(tmp_path / "raw"), *words(form)]
    assert pack([*argv, "--format", "raw", "--short-side", str(SIDE)]) == 0
    packed, files = (
        pixels_of(loader_of(open_part(*place, is_train=False), form, is_train=False))
        for place in (("raw/x", tmp_path / "raw"), ("IMNET", root))
    )
    assert torch.equal(packed, files)


def test_smaller_files_of_shards_lose_nothing(kind, tmp_path, capsys):
    form, root = kind
    argv = ["--data-path", str(root), "--output-dir", str(tmp_path / "shards"), *words(form)]
    assert pack([*argv, "--short-side", str(SIDE)]) == 0
    packed, files = (
        open_part(*p).source for p in (("wds/x", tmp_path / "shards"), ("IMNET", root))
    )
    for number in range(3):
        whole = decode_bands(files.open(number), form).numpy()
        want = by_pillow(whole, (SIDE, round(SIDE * 60 / 50))).clip(0, form.levels)
        assert np.abs(decode_bands(packed.open(number), form).numpy() - want).max() < 0.51
    assert packed.open(3).read() == Path(files.open(3)).read_bytes()
    assert pack([*argv, "--short-side", str(SIDE), "--quality", "90"]) == 2
    assert "--quality: leave it out" in capsys.readouterr().err


def test_packed_bands_are_no_colours(tmp_path):
    (tmp_path / "set/train/a").mkdir(parents=True)
    (tmp_path / "set/val/a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 8, 5), dtype=np.uint16)
    for part, bands in (("train", pixels), ("val", pixels[:3])):
        np.save(tmp_path / "set" / part / "a" / "0.npy", bands)
    argv = ["--data-path", str(tmp_path / "set"), "--output-dir", str(tmp_path / "raw")]
    assert pack([*argv, *words(Form(5, 16)), "--format", "raw"]) == 0
    part = open_part("raw/x", tmp_path / "raw")
    # Other levels are made of them, other bands aren't.
    want = np.rint(pixels / 257).transpose(2, 0, 1)
    assert np.array_equal(decode_bands(part.source.open(0), Form(5, 8)), want)
    for form in (Form(4, 16), Form(3, 8)):
        with pytest.raises(DataError, match=r"0\.npy: 5 bands, not the .*--in-chans"):
            pixels_of(loader_of(part, form))


def test_as_many_rows_as_bands_are_told_apart(tmp_path):
    bands = np.random.default_rng(0).integers(0, 256, (40, 70, 20), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / "set" / part / "a").mkdir(parents=True)
        np.save(tmp_path / "set" / part / "a" / "0.npy", bands)
    argv = ["--data-path", str(tmp_path / "set"), "--output-dir", str(tmp_path / "shards")]
    assert pack([*argv, *words(Form(20, 8)), "--short-side", "20"]) == 0
    found = decode_bands(open_part("wds/x", tmp_path / "shards").source.open(0), Form(20, 8))
    assert np.abs(found.numpy() - by_pillow(bands.transpose(2, 0, 1), (20, 35))).max() <= 1


def test_the_kinds_of_one_set_have_files_of_their_own(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "set" / part / "a").mkdir(parents=True)
        Image.new("L", (30, 30), 7).save(tmp_path / "set" / part / "a" / "0.png")
    part = open_part("IMNET", tmp_path / "set")
    for form in (Form(1, 8), Form(3, 16), Form(3, 8)):
        pixels_of(disk_cached(loader_of(part, form), options_for(tmp_path, 0)))
    assert len(list((tmp_path / "cache").iterdir())) == 3
