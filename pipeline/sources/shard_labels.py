"""Several labels per image in WebDataset's form: lists in ``.cls`` or ``.json``."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import bounded
from errors import DataError, shortened
from pipeline.sources.labels import Labels, each_once, label_texts

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
