"""DICOM files, compared with pydicom's own window; those that mean harm.

Also of pipeline/dicom_frames.py and pipeline/dicom_greys.py.
"""

import io
import struct
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.uid import (
    JPEG2000,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

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
        ({"PhotometricInterpretation": "A\nB"}, r"DICOM in 'A\\nB' of 1"),
        ({"Rows": 1, "Columns": 1}, r"pixels that claims to be \(1, 1\)"),
    ],
)
def test_what_is_no_plain_image(changes, what):
    with pytest.raises(BadImageError, match=what):
        decode(written(dataset(**changes)))


def table(entries, first: int, bits: int) -> list[pydicom.Dataset]:
    item = pydicom.Dataset()
    signed = "SS" if first < 0 else "US"
    item.add_new("LUTDescriptor", signed, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return [item]


CURVE = (np.linspace(0, 1, 500) ** 2 * 4095).astype(int)  # of 12 bits
VOI = table((np.linspace(1, 0, 3000) * 1023).astype(int), 300, 10)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_tables_are_followed_as_pydicom_does(syntax):
    """Values before and behind those of a table included; a table goes before a window."""
    found = dataset(ModalityLUTSequence=table(CURVE, -250, 16), VOILUTSequence=VOI)
    found.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        found.PixelData = VALUES.byteswap().tobytes()
    modality = apply_modality_lut(VALUES, found)
    wanted = apply_voi_lut(modality, found) / 1023
    assert len(np.unique(wanted)) > 9
    pixels = decode_bands(written(found), Form(1, 16)).numpy()[0]
    np.testing.assert_allclose(pixels / 65535, wanted, atol=1e-5)
    # Without a table for the eye: the whole range of the first.
    del found.VOILUTSequence, found.WindowCenter, found.WindowWidth
    pixels = decode_bands(written(found), Form(1, 16)).numpy()[0]
    np.testing.assert_array_equal(pixels, modality)


def test_a_voi_table_of_rescaled_values():
    found = dataset(VOILUTSequence=VOI, PhotometricInterpretation="MONOCHROME1")
    rescaled = apply_modality_lut(VALUES, found).astype(np.int32)
    wanted = 1 - apply_voi_lut(rescaled, found) / 1023
    pixels = decode_bands(written(found), Form(1, 16)).numpy()[0]
    np.testing.assert_allclose(pixels / 65535, wanted, atol=1e-5)


@pytest.mark.parametrize("signed", [0, 1])
def test_bits_that_are_not_stored_are_left_out(signed):
    """As overlays were once kept, and signs that don't reach up to the last bit."""
    plain = VALUES if signed else VALUES.astype(np.uint16) & 0xFFF
    changes = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": signed}
    changes["WindowWidth"] = 9000
    other = (plain.astype(np.uint16) & 0xFFF) | 0x5000
    first, second = (
        decode_bands(written(dataset(PixelData=values.tobytes(), **changes)), Form(1, 16))
        for values in (plain, other)
    )
    assert len(first.unique()) > 20
    assert first.equal(second)


def coloured(**changes) -> pydicom.Dataset:
    colours = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    changes = {"BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0} | changes
    given = {"BitsAllocated": 8, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}
    given |= {"PlanarConfiguration": 0, "PixelData": colours.tobytes()}
    return dataset(**(given | changes))


def test_colours():
    pixels = np.frombuffer(coloured().PixelData, np.uint8).reshape(6, 10, 3)
    assert (np.asarray(decode(written(coloured()))) == pixels).all()
    planes = pixels.transpose(2, 0, 1).tobytes()
    by_plane = coloured(PlanarConfiguration=1, PixelData=planes)
    assert (np.asarray(decode(written(by_plane))) == pixels).all()
    other = coloured(PhotometricInterpretation="YBR_FULL")
    wanted = np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB")).astype(int)
    assert abs(np.asarray(decode(written(other))) - wanted).max() <= 1


def group() -> list[pydicom.Dataset]:
    item = pydicom.Dataset()
    item.PixelValueTransformationSequence = [pydicom.Dataset()]
    return [item]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"HighBit": 14}, "bit 14 of 16"),
        ({"BitsStored": 17, "HighBit": 16}, "17 bits"),
        ({"BitsStored": 0, "HighBit": None}, "0 bits"),
        ({"VOILUTSequence": table([0, 1024], 0, 10)}, "entry of 1,024 in 10 bits"),
        ({"VOILUTSequence": table([0, 1], 0, 9)}, "9 bits"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "no descriptor"),
        ({"SharedFunctionalGroupsSequence": group()}, "functional groups"),
    ],
)
def test_what_cannot_be_told_is_refused(changes, what):
    with pytest.raises(BadImageError, match=what):
        decode(written(dataset(**changes)))


def test_a_table_shorter_than_it_says_is_refused():
    found = dataset(ModalityLUTSequence=table([1, 2, 3], 0, 16))
    found.ModalityLUTSequence[0].LUTDescriptor = [4, 0, 16]
    with pytest.raises(BadImageError, match="4 entries in 6 bytes"):
        decode(written(found))


# --- compressed ----------------------------------------------------------------------------------


def compressed(found: pydicom.Dataset, syntax: str, frame: bytes) -> pydicom.Dataset:
    found.file_meta.TransferSyntaxUID = syntax
    found.PixelData = encapsulate([frame])
    found["PixelData"].is_undefined_length = True
    return found


def by_pillow(image: Image.Image, form: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


# Bits that are stored, and whether there is a sign.
KINDS = {"16 signed": (16, 1), "12 signed": (12, 1), "12": (12, 0), "8": (8, 0)}


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(RLELossless, None), (JPEGLSLossless, "jpeg_ls"), (JPEG2000Lossless, "openjpeg")],
)
@pytest.mark.parametrize("kind", [*KINDS, "colours"])
def test_compressed_without_loss(syntax, package, kind):
    if package is not None:
        pytest.importorskip(package)
    if kind == "colours":
        found = coloured(PixelData=np.arange(66 * 80 * 3, dtype=np.uint16).astype("u1").tobytes())
    else:
        bits, sign = KINDS[kind]
        whole = 8 if bits == 8 else 16
        kept = np.tile(VALUES if sign else (VALUES + 600) & (2**bits - 1), (11, 8))
        found = dataset(BitsStored=bits, HighBit=bits - 1, PixelRepresentation=sign)
        found.BitsAllocated, found.WindowWidth = whole, 9000
        found.PixelData = kept.astype(f"u{whole // 8}").tobytes()
        found["PixelData"].VR = "OB" if whole == 8 else "OW"
    found.Rows, found.Columns = 66, 80
    form = Form(3 if kind == "colours" else 1, 16)
    plain = decode_bands(written(found), form)
    found.compress(syntax)
    assert len(plain.unique()) > 20
    assert decode_bands(written(found), form).equal(plain)


@pytest.mark.parametrize("kind", ["YBR_FULL_422", "MONOCHROME2"])
def test_jpeg_as_pillow_reads_it(kind):
    ramp = np.linspace(0, 255, 240).reshape(12, 20).astype(np.uint8)
    image = Image.fromarray(
        ramp if kind == "MONOCHROME2" else np.stack([ramp, ramp.T.reshape(12, 20), ramp[::-1]], 2)
    )
    frame = by_pillow(image, "JPEG", quality=90, subsampling=1 if image.mode == "RGB" else 0)
    found = coloured(PhotometricInterpretation=kind, Rows=12, Columns=20)
    for name in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"):
        delattr(found, name)
    found.SamplesPerPixel = len(image.getbands())
    pixels = np.asarray(decode(written(compressed(found, JPEGBaseline8Bit, frame)))).astype(int)
    assert abs(pixels - np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))).max() <= 1


def test_jpeg_2000_that_pillow_wrote():
    pixels = np.frombuffer(coloured().PixelData, np.uint8).reshape(6, 10, 3)
    frame = by_pillow(Image.fromarray(pixels), "JPEG2000", no_jp2=True, mct=1, irreversible=False)
    found = compressed(coloured(PhotometricInterpretation="YBR_RCT"), JPEG2000, frame)
    assert (np.asarray(decode(written(found))) == pixels).all()


def test_a_package_that_is_missing_is_named(monkeypatch):
    found = compressed(dataset(), JPEGLosslessSV1, b"\xff\xd8\xff")
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda _: SimpleNamespace(is_available=0))
    with pytest.raises(BadImageError, match="JPEG Lossless: pip install pylibjpeg pylibjpeg-libj"):
        decode(written(found))


GREY = Image.fromarray(np.zeros((6, 10), np.uint8))
SMALL_JPEG = by_pillow(GREY, "JPEG")
LARGE_JPEG = SMALL_JPEG.replace(b"\xff\xc0\0\x0b\x08\0\6\0\x0a", b"\xff\xc0\0\x0b\x08\x7f\0\x7f\0")
PROGRESSIVE = by_pillow(GREY, "JPEG", progressive=True)
J2K = by_pillow(GREY, "JPEG2000", no_jp2=True)
BOMB = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 600_000


@pytest.mark.parametrize(
    ("syntax", "frame", "what"),
    [
        (JPEGBaseline8Bit, LARGE_JPEG, "holds 32512×32512×1 in 8"),
        (JPEGBaseline8Bit, PROGRESSIVE, "another kind"),
        (JPEGBaseline8Bit, J2K, "no image in JPEG Baseline"),
        (JPEGBaseline8Bit, SMALL_JPEG[:40], "damaged"),
        (
            JPEG2000,
            J2K.replace(b"\0\0\0\x0a\0\0\0\6", b"\0\0\x1f\x0a\0\0\x1f\6"),
            "holds 7942×7946×1|tiles",
        ),
        (JPEG2000, J2K[:60], "damaged"),
        (RLELossless, struct.pack("<16L", 2, 64, 70, *[0] * 13) + bytes(20), "1 planes"),
        (RLELossless, struct.pack("<16L", 1, 9, *[0] * 14) + bytes(20), "lie outside"),
        (RLELossless, bytes(2), "RLE has 0"),
        (RLELossless, BOMB * 2, "compressed bytes"),
    ],
)
def test_frames_that_are_not_what_the_file_says(syntax, frame, what):
    found = dataset(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0)
    with pytest.raises(BadImageError, match=what):
        decode(written(compressed(found, syntax, frame)))


def test_rle_that_becomes_more_than_the_image():
    found = dataset(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0)
    found.Rows = found.Columns = 512
    with pytest.raises(BadImageError, match="hold more than the image"):
        decode(written(compressed(found, RLELossless, BOMB)))


def test_parts_of_a_frame_are_joined():
    found = dataset()
    plain = decode(written(found))
    found.compress(RLELossless)
    frame = next(pydicom.encaps.generate_frames(found.PixelData, number_of_frames=1))
    found.PixelData = encapsulate([frame], fragments_per_frame=3)
    found["PixelData"].is_undefined_length = True
    assert decode(written(found)) == plain
    found.PixelData = found.PixelData[:40] + b"rest" + found.PixelData[40:]
    with pytest.raises(BadImageError, match="damaged"):
        decode(written(found))


def test_huge_frames_and_compressed_files_are_refused_by_their_header():
    with pytest.raises(TooLargeError):
        decode(written(dataset(Rows=65535, Columns=65535)))
    found = dataset()
    content = written(found)
    for syntax, what in ((JPEGBaseline8Bit, "damaged"), ("1.2.840.10008.1.2.1.99", "compressed")):
        padded = str(syntax).encode() + b"\0" * (len(syntax) % 2)
        plain = bytes(content).replace(
            b"\x02\x00\x10\x00UI\x14\x00" + str(ExplicitVRLittleEndian).encode() + b"\0",
            b"\x02\x00\x10\x00UI" + len(padded).to_bytes(2, "little") + padded,
        )
        assert plain != content
        with pytest.raises(BadImageError, match=what):
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
