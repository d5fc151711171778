"""DICOM files: one uncompressed image, as what a radiologist is shown.

Greys go through the rescale slope and intercept (PS3.3 C.11.1) and the first VOI window (C.11.2);
without a window the whole range of the stored bits is shown, so that two files stay comparable.
MONOCHROME1, where the least value is white, is inverted.
"""

import math
import re
import warnings
from typing import Any, BinaryIO

import numpy as np

from pipeline.limits import BadImageError, check_pixels

EXTENSIONS = (".dcm", ".dicom")
PACKAGE = "pydicom"
_AT, _MARK = 128, b"DICM"
_META = 1 << 16  # bytes in which the transfer syntax is to be found
_SYNTAX = re.compile(rb"\x02\x00\x10\x00UI(..)([0-9.]+)", re.DOTALL)
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL")
_COST = 40  # bytes of memory per pixel: floats as they are rescaled


def is_dicom(file: BinaryIO) -> bool:
    """Whether it begins as DICOM files do (PS3.10, 7.1)."""
    file.seek(_AT)
    return file.read(len(_MARK)) == _MARK


def read_dicom(file: BinaryIO) -> np.ndarray:
    """The image in 0-1: float32 (H, W), or (H, W, 3) where it has colours.

    Raises BadImageError without the package pydicom, and for what isn't one uncompressed image.
    """
    try:
        import pydicom
    except ImportError:
        raise BadImageError(f"DICOM needs a package: pip install {PACKAGE}") from None
    _check_syntax(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True)
            kind = _checked(header)
            file.seek(0)
            found = pydicom.dcmread(file)
            values = pydicom.pixels.pixel_array(found)
    except (BadImageError, MemoryError):
        raise
    except Exception:  # pydicom raises almost anything on a damaged file
        raise BadImageError("a damaged DICOM file, or one without an image") from None
    if kind in _COLOURS:
        return (values / np.float32(2 ** int(header.BitsStored) - 1)).astype(np.float32)
    shown = windowed(values.astype(np.float64), header)
    return (1 - shown if kind == "MONOCHROME1" else shown).astype(np.float32)


def _check_syntax(file: BinaryIO) -> None:
    """Raise BadImageError for compressed files: what they hold has no bounds in the header."""
    file.seek(0)
    found = _SYNTAX.search(file.read(_META))
    syntax = found[2][: int.from_bytes(found[1], "little")].decode() if found else ""
    if syntax not in _PLAIN:
        what = f"compressed (transfer syntax {syntax})" if syntax else "without a transfer syntax"
        raise BadImageError(f"DICOM {what}: write it uncompressed, with gdcmconv --raw")


def _checked(header: Any) -> str:
    """The photometric interpretation of what is one image within the limits."""
    height, width = int(header.Rows), int(header.Columns)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1:
        raise BadImageError(f"DICOM of {frames:,} frames: write each to a file of its own")
    check_pixels("DICOM image", width, height, _COST)
    kind, samples = str(header.PhotometricInterpretation), int(header.SamplesPerPixel)
    if samples != (1 if kind in _GREYS else 3) or kind not in (*_GREYS, *_COLOURS):
        raise BadImageError(f"DICOM in {kind} of {samples} samples: write it as MONOCHROME2 or RGB")
    if int(header.BitsAllocated) not in (8, 16):
        raise BadImageError(f"DICOM of {header.BitsAllocated} bits: write 8 or 16")
    return kind


def windowed(values: np.ndarray, header: Any) -> np.ndarray:
    """Stored greys, float64, as they are shown, in 0-1, by the rescaling and window of a header.

    Raises BadImageError for a window that is none.
    """
    slope, intercept = (
        float(default if header.get(name) is None else header.get(name))
        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
    low = -(2 ** (bits - 1)) if signed else 0
    ends = [slope * x + intercept for x in (low, low + 2**bits - 1)]
    values = values * slope + intercept
    centre, width = (_first(header.get(n)) for n in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        low, high = min(ends), max(ends)
        return ((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)
    shape = str(header.get("VOILUTFunction") or "LINEAR")
    if not math.isfinite(centre) or not width >= (1 if shape == "LINEAR" else 1e-12):
        raise BadImageError(f"DICOM with a window of centre {centre:g} and width {width:g}")
    if shape == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-60, 60)))
    if shape == "LINEAR":  # C.11.2.1.2.1: of whole numbers, whose ends count
        centre, width = centre - 0.5, width - 1
    if width <= 0:
        return (values > centre).astype(np.float64)
    return ((values - centre) / width + 0.5).clip(0, 1)


def _first(value: Any) -> float | None:
    """The first of what may be several windows."""
    if value is None or isinstance(value, str):
        return None
    several = not isinstance(value, int | float) and hasattr(value, "__len__")
    return (float(value[0]) if len(value) else None) if several else float(value)
