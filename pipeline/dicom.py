"""DICOM files: one image, as what a radiologist is shown.

Greys go through the modality table, or rescale slope and intercept (PS3.3 C.11.1), and the first
VOI table or window (C.11.2); without either the whole range of the stored bits is shown, so that
two files stay comparable. MONOCHROME1, where the least value is white, is inverted.
"""

import io
import warnings
from typing import Any, BinaryIO

import numpy as np

from errors import shown as shown_text
from pipeline.dicom_frames import INSTEAD, Syntax, check_frame, transfer_syntax
from pipeline.dicom_greys import check_groups, of_stored_bits, shown
from pipeline.limits import BadImageError, check_pixels

EXTENSIONS = (".dcm", ".dicom")
PACKAGE = "pydicom"
_AT, _MARK = 128, b"DICM"
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL")
_COST = 40  # bytes of memory per pixel: floats as they are rescaled


def is_dicom(file: BinaryIO) -> bool:
    """Whether it begins as DICOM files do (PS3.10, 7.1)."""
    file.seek(_AT)
    return file.read(len(_MARK)) == _MARK


def read_dicom(file: BinaryIO) -> np.ndarray:
    """The image in 0-1: float32 (H, W), or (H, W, 3) where it has colours.

    Raises BadImageError without pydicom or the package for how the image is compressed, and for
    what isn't one image of greys or colours.
    """
    try:
        import pydicom
    except ImportError:
        raise BadImageError(f"DICOM needs a package: pip install {PACKAGE}") from None
    if not isinstance(file, io.BytesIO):
        # Before it reads, a file on disk allocates the length that an element claims to have.
        file.seek(0)
        file = io.BytesIO(file.read())
    syntax = transfer_syntax(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True)
            kind = _checked(header, syntax)
            file.seek(0)
            found = pydicom.dcmread(file)
            if syntax is not None:
                check_frame(found, syntax)
            values = pydicom.pixels.pixel_array(found)
            shape = (int(header.Rows), int(header.Columns), *((3,) if kind not in _GREYS else ()))
            if values.shape != shape:
                raise BadImageError(
                    f"DICOM of {values.shape} pixels that claims to be {shape}: write it anew"
                )
            values = of_stored_bits(values, header, exact=syntax is not None)
            if kind not in _GREYS:
                return (values / np.float32(2 ** int(header.BitsStored) - 1)).astype(np.float32)
            greys = shown(values, header)
    except (BadImageError, MemoryError):
        raise
    except Exception:  # pydicom raises almost anything on a damaged file
        raise BadImageError(_unreadable(syntax)) from None
    return (1 - greys if kind == "MONOCHROME1" else greys).astype(np.float32)


def _unreadable(syntax: Syntax | None) -> str:
    what = "a damaged DICOM file, or one without an image"
    if syntax is None:
        return what
    package = f"pip install {syntax.packages}, or " if syntax.packages else ""
    return f"{what}, or {syntax.name} that isn't read: {package}{INSTEAD}"


def _checked(header: Any, syntax: Syntax | None) -> str:
    """The photometric interpretation of what is one image within the limits."""
    height, width = int(header.Rows), int(header.Columns)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1:
        raise BadImageError(
            f"DICOM of {frames:,} frames: a label is of one image, write each frame to a file of "
            "its own, as dcmj2pnm --all-frames does"
        )
    check_pixels("DICOM image", width, height, _COST)
    kind, samples = str(header.PhotometricInterpretation), int(header.SamplesPerPixel)
    colours = _COLOURS if syntax is None else syntax.colours
    if samples != (1 if kind in _GREYS else 3) or kind not in (*_GREYS, *colours):
        raise BadImageError(
            f"DICOM in {shown_text(kind)} of {samples} samples: write it as MONOCHROME2 or RGB"
        )
    allocated, stored, signed = (
        int(header[name].value) for name in ("BitsAllocated", "BitsStored", "PixelRepresentation")
    )
    if allocated not in (8, 16):
        raise BadImageError(f"DICOM of {allocated} bits: write 8 or 16")
    high = int(header.get("HighBit", stored - 1))
    if not 1 <= stored <= allocated or high != stored - 1 or signed not in (0, 1):
        raise BadImageError(
            f"DICOM of {stored} bits up to bit {high} of {allocated}, sign {signed}: write it anew"
        )
    if kind not in _GREYS and (signed or (kind.startswith("YBR_FULL") and stored != 8)):
        raise BadImageError(f"DICOM in {kind} of {stored} bits, sign {signed}: write it as RGB")
    check_groups(header)
    return kind
