"""Greys of DICOM files as they are shown: stored bits, modality and VOI tables, windows."""

import math
from typing import Any, NamedTuple

import numpy as np

from pipeline.limits import BadImageError

_DESCRIPTOR, _DATA = 0x00283002, 0x00283006  # of a table
_ENTRIES = 1 << 16  # what a descriptor's zero stands for
_DEPTHS = (8, *range(10, 17))
_MOST_BYTES = 16 << 20  # of a sequence; a table has at most 128 KiB
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_IN_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


class Table(NamedTuple):
    """What stored values become (PS3.3, C.11.1.1 and C.11.2.1.1)."""

    first: int
    """The value that the first entry is for; those outside become the nearest entry."""
    entries: np.ndarray
    most: int
    """The greatest value that entries of so many bits may have."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Numbers, whole or not, to int32 of the same shape."""
        places = np.clip(values - float(self.first), 0, len(self.entries) - 1)
        return self.entries[places.astype(np.int32)]


def check_groups(header: Any) -> None:
    """Raise BadImageError where a rescaling or window is to be found in functional groups."""
    for name in _GROUPS:
        if any(inner in item for item in _items(header, name) for inner in _IN_GROUPS):
            raise BadImageError(
                "DICOM whose rescaling or window is in functional groups: write it as a plain, "
                "not an enhanced, image"
            )


def of_stored_bits(values: np.ndarray, header: Any, *, exact: bool) -> np.ndarray:
    """Whole numbers as int32, without what else their BitsAllocated hold, as overlays.

    Args:
        exact: there is nothing else: raise BadImageError where there is.
    """
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
    half, full = 1 << bits - 1, (1 << bits) - 1
    values = values.astype(np.int32)
    if exact and not (-half if signed else 0) <= values.min() <= values.max() <= full:
        raise BadImageError(
            f"DICOM with values from {values.min():,} to {values.max():,}, of which {bits} bits "
            "are stored: write it anew"
        )
    values &= full
    return (values ^ half) - half if signed else values


def shown(values: np.ndarray, header: Any) -> np.ndarray:
    """Stored greys, whole numbers, as they are shown: float64 in 0-1.

    Raises BadImageError for tables and windows that are none.
    """
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
    table = _table(header, "ModalityLUTSequence")
    if table is not None:
        values, ends = table(values), [0.0, float(table.most)]
    else:
        slope, intercept = (
            float(default if header.get(name) is None else header.get(name))
            for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        low = -(2 ** (bits - 1)) if signed else 0
        ends = [slope * x + intercept for x in (low, low + 2**bits - 1)]
        values = values * slope + intercept
    table = _table(header, "VOILUTSequence")
    if table is not None:
        return table(values) / table.most
    return _windowed(values.astype(np.float64, copy=False), header, min(ends), max(ends))


def _windowed(values: np.ndarray, header: Any, low: float, high: float) -> np.ndarray:
    """By the first window, or the whole range from ``low`` to ``high``."""
    centre, width = (_first(header.get(n)) for n in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
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


# --- tables --------------------------------------------------------------------------------------


def _items(header: Any, name: str) -> Any:
    """The items of a sequence, none where there is none. Raises BadImageError for a huge one."""
    if name not in header:
        return ()
    stored = getattr(header.get_item(name), "value", None)
    if isinstance(stored, bytes) and len(stored) > _MOST_BYTES:
        raise BadImageError(f"DICOM with {len(stored):,} bytes of {name}")
    return header[name].value or ()


def _table(header: Any, name: str) -> Table | None:
    """The first table of a sequence. Raises BadImageError for one that can't be followed."""
    items = _items(header, name)
    if not items:
        return None
    item, wrong = items[0], f"DICOM with a damaged {name}"
    descriptor = item.get(_DESCRIPTOR)
    # As bytes: as numbers of Python a long one takes many times its size.
    data = item.get_item(_DATA).value if _DATA in item else None
    if descriptor is None or not isinstance(data, bytes):
        raise BadImageError(f"{wrong}: no descriptor, or no table")
    if len(descriptor.value) != 3:
        raise BadImageError(f"{wrong}: a descriptor of other than three values")
    count, first, bits = (int(value) for value in descriptor.value)
    count = count & (_ENTRIES - 1) or _ENTRIES
    if bits not in _DEPTHS:
        raise BadImageError(f"{wrong}: entries of {bits} bits")
    if len(data) != 2 * count:
        raise BadImageError(f"{wrong}: {count:,} entries in {len(data):,} bytes")
    order = "<" if header.original_encoding[1] else ">"
    entries = np.frombuffer(data, dtype=f"{order}u2").astype(np.int32)
    most = 2**bits - 1
    if entries.max() > most:
        raise BadImageError(f"{wrong}: an entry of {entries.max():,} in {bits} bits")
    return Table(first, entries, most)
