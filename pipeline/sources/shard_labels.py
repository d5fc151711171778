"""Several labels per image in WebDataset's form: in ``.cls`` or ``.json``, and in an index."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import bounded
from errors import DataError, shortened
from pipeline.sources.labels import MOST_NAME, Labels, each_once, label_texts

_KEYS = ("labels", "label", "tags")  # of a .json


class Member(Protocol):
    """What is known of a member of a sample."""

    content: bytes


def labels_of_sample(shard: Path, key: str, members: Mapping[str, Member]) -> Labels:
    """The labels of a sample as texts: those of its ``.json``, else of its ``.cls``.

    A ``.json`` has a list of names or numbers as ``labels``, ``label`` or ``tags``, or is such a
    list; a ``.cls`` has numbers between spaces, commas or line ends, or a JSON list. An empty list
    or file says that there is none. Raises DataError for anything else.
    """
    try:
        if "json" in members:
            return each_once(_of_json(bounded.parse_json(members["json"].content)))
        text = members["cls"].content.decode("utf-8").strip()
        if text.startswith("["):
            return each_once(label_texts(bounded.parse_json(text.encode())))
        return each_once(re.split(r"[\s,;]+", text))
    except (KeyError, ValueError, RecursionError):
        raise DataError(
            f"{shard}: sample {shortened(key)} needs its labels as .cls, or as a list 'labels' of "
            ".json"
        ) from None


def _of_json(found: Any) -> list[str]:
    """Raises KeyError or ValueError."""
    if not isinstance(found, dict):
        return label_texts(found)
    name = next((key for key in _KEYS if key in found), _KEYS[0])
    value = found[name]
    return label_texts(value if isinstance(value, list) else [value])


# --- in an index ----------------------------------------------------------------------------------

ARRAYS = ("label_names", "label_counts", "label_numbers")


def stored(labels: Sequence[Labels]) -> dict[str, np.ndarray]:
    """The labels of N samples as arrays: the names as JSON, uint8; how many each sample has, (N,)
    int64; and the numbers of all labels, one sample after another, int64."""
    names = list(dict.fromkeys(name for each in labels for name in each))
    number = {name: place for place, name in enumerate(names)}
    arrays = (
        np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
        np.array([len(each) for each in labels], dtype=np.int64),
        np.array([number[name] for each in labels for name in each], dtype=np.int64),
    )
    return dict(zip(ARRAYS, arrays, strict=True))


def restored(arrays: Mapping[str, np.ndarray], count: int) -> list[Labels]:
    """The labels of ``count`` samples from what :func:`stored` made. Raises ValueError."""
    text, counts, numbers = (arrays[name] for name in ARRAYS)
    if (text.dtype, counts.dtype.kind, numbers.dtype.kind) != (np.uint8, "i", "i"):
        raise ValueError("its labels have other types")
    if counts.shape != (count,) or text.ndim != 1 or numbers.ndim != 1:
        raise ValueError("its labels have other shapes")
    names = bounded.parse_json(text.tobytes())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its labels have no list of names")
    if any(len(name) > MOST_NAME for name in names) or len(set(names)) < len(names):
        raise ValueError(f"a name of a label is there twice, or has over {MOST_NAME} characters")
    # Counts that are too large would add up to any sum.
    if ((counts < 0) | (counts > len(numbers))).any() or counts.sum() != len(numbers):
        raise ValueError("it counts more labels, or fewer, than there are")
    if ((numbers < 0) | (numbers >= len(names))).any():
        raise ValueError("it has labels without a name")
    ends = counts.cumsum()
    each = (numbers[end - size : end].tolist() for end, size in zip(ends, counts, strict=True))
    return [each_once([names[number] for number in one]) for one in each]
