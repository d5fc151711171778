"""The forms of ``--class-weights``."""

import math
from pathlib import PurePath
from typing import Literal, NamedTuple

from errors import OptionError, did_you_mean, shown

_OPTION = "class_weights"
_SUFFIXES = (".csv", ".tsv", ".json", ".txt")
_FORMS = "none, balanced, effective:0.999, NAME=WEIGHT,NAME=WEIGHT or a .csv, .json or .txt file"


class ClassWeights(NamedTuple):
    """What ``--class-weights`` asks for."""

    kind: Literal["none", "balanced", "effective", "named", "file"]
    beta: float = 0.0
    """Of effective."""
    named: tuple[tuple[str, float], ...] = ()
    """Class names and their weights."""
    file: str = ""


def parse_class_weights(text: str) -> ClassWeights:
    """Raises OptionError for a text of no form. A file is not looked at."""
    if text in ("none", "balanced"):
        return ClassWeights(text)
    word, colon, value = text.partition(":")
    if word == "effective":
        beta = _number(value) if colon else None
        if beta is None or not 0 <= beta < 1:
            raise OptionError(
                _OPTION, f"{shown(text)}: give β from 0 to below 1, e.g. effective:0.999"
            )
        return ClassWeights("effective", beta)
    path = PurePath(text)
    if path.suffix.lower() in _SUFFIXES:
        return ClassWeights("file", file=text)
    if "=" in text:
        return ClassWeights("named", named=_pairs(text))
    hint = did_you_mean(text, ("none", "balanced", "effective:0.999"), otherwise=f"give {_FORMS}")
    raise OptionError(_OPTION, f"{shown(text)} is none of its forms; {hint}")


def weight_of(text: str) -> float | None:
    """The weight that ``text`` says; None unless it is a finite number above 0."""
    number = _number(text)
    return number if number is not None and number > 0 else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _pairs(text: str) -> tuple[tuple[str, float], ...]:
    pairs: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        name, weight = name.strip(), weight_of(value)
        if not equals or not name or weight is None:
            raise OptionError(
                _OPTION,
                f"{shown(part)} is not NAME=WEIGHT with a weight above 0 (a name with a comma "
                "needs a file)",
            )
        if name in pairs:
            raise OptionError(_OPTION, f"{shown(name)} is there twice: leave one out")
        pairs[name] = weight
    return tuple(pairs.items())
