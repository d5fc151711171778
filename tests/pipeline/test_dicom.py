"""DICOM files, compared with pydicom's own window; those that mean harm."""

import io

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from augmentation.protocol import Form
from pipeline.bands import decode_bands
from pipeline.decoding import decode
from pipeline.limits import BadImageError, TooLargeError

VALUES = np.arange(-600, 600, 20, dtype=np.int16).reshape(6, 10)


def dataset(**changes) -> pydicom.Dataset:
    found = pydicom.Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    found.Rows, found.Columns, found.SamplesPerPixel = 6, 10, 1
    found.PhotometricInterpretation = "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = 16
    found.HighBit, found.PixelRepresentation = 15, 1
    found.RescaleSlope, found.RescaleIntercept = 2, -100
    found.WindowCenter, found.WindowWidth = [40, 300], [400, 900]
    found.PixelData = VALUES.tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(found, name)
        else:
            setattr(found, name, value)
    return found


def written(found: pydicom.Dataset) -> bytes:
    found.save_as(buffer := io.BytesIO(), enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_rescaled_and_windowed_as_pydicom_does(shape):
    found = dataset(VOILUTFunction=shape)
    shown = apply_windowing(apply_modality_lut(VALUES, found), found)
    ends = np.array([-32768, 32767]) * 2 - 100
    wanted = (shown - ends[0]) / (ends[1] - ends[0])
    pixels = decode_bands(written(found), Form(1, 16)).numpy()[0]
    np.testing.assert_allclose(pixels / 65535, wanted, atol=1e-5)
    inverted = dataset(VOILUTFunction=shape, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(
        decode_bands(written(inverted), Form(1, 16)).numpy()[0] / 65535, 1 - wanted, atol=1e-5
    )


def test_without_a_window_the_stored_range_is_shown():
    found = dataset(WindowCenter=None, WindowWidth=None, BitsStored=12, HighBit=11)
    pixels = decode_bands(written(found), Form(1, 16)).numpy()[0]
    np.testing.assert_allclose(pixels / 65535, (VALUES + 2048) / 4095, atol=1e-5)


def test_greys_are_three_equal_colours():
    content = written(dataset())
    rgb, grey = np.asarray(decode(content)), decode_bands(content, Form(1)).numpy()[0]
    assert rgb.shape == (6, 10, 3)
    assert (rgb == grey[..., None]).all()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"NumberOfFrames": 2, "PixelData": VALUES.tobytes() * 2}, "2 frames"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"BitsAllocated": 32, "PixelData": VALUES.tobytes() * 2}, "32 bits"),
        ({"WindowWidth": 0}, "width 0"),
        ({"Rows": 7}, "damaged"),
        ({"PixelData": None}, "damaged"),
    ],
)
def test_what_is_no_plain_image(changes, what):
    with pytest.raises(BadImageError, match=what):
        decode(written(dataset(**changes)))


def test_huge_frames_and_compressed_files_are_refused_by_their_header():
    with pytest.raises(TooLargeError):
        decode(written(dataset(Rows=65535, Columns=65535)))
    found = dataset()
    content = written(found)
    for syntax in (JPEGBaseline8Bit, "1.2.840.10008.1.2.1.99"):
        padded = str(syntax).encode() + b"\0" * (len(syntax) % 2)
        plain = bytes(content).replace(
            b"\x02\x00\x10\x00UI\x14\x00" + str(ExplicitVRLittleEndian).encode() + b"\0",
            b"\x02\x00\x10\x00UI" + len(padded).to_bytes(2, "little") + padded,
        )
        assert plain != content
        with pytest.raises(BadImageError, match="compressed"):
            decode(plain)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(132, len(damaged), 3):
            damaged[place] ^= 1 << int(rng.integers(8))
        try:
            decode(bytes(damaged))
        except BadImageError:
            continue
