"""Values of options from the texts of the command line and the values of YAML."""

import math
import operator
import os
import types
import typing
from typing import Any, Literal

from config.declared import UNIONS, Option
from config.metrics import metric_key
from errors import OptionError, shown

MOST_TEXT = 10_000  # characters of a value
_INT64 = 2**63
# What values out of range may mean, and what to do.
_OF_BYTES = ": that is of pixels in 0–255, divide it by 255"
_OUTSIDE = {("mean", "high"): _OF_BYTES, ("std", "high"): _OF_BYTES}
_CHANNELS = ": height and width; for other channels than three, --in-chans"
# Values that DeiT and timm know, and what to take.
_INSTEAD = {("sched", "tanh"): ": take cosine"}


def convert(opt: Option, raw: Any) -> Any:
    """``raw`` (from YAML, or a string of the command line) as a value of ``opt``.

    Raises OptionError where it is none.
    """
    try:
        value = _as_type(opt.type, raw)
    except ValueError:
        instead = _INSTEAD.get((opt.name, raw), "") if isinstance(raw, str) else ""
        raise OptionError(
            opt.name, f"expected {opt.type_name}, got {shown(raw)}{instead}"
        ) from None
    if opt.name == "best_metric":
        value = metric_key(value)
    for element in value if isinstance(value, tuple) else (value,):
        if isinstance(element, str):
            _check_text(opt, element)
        elif isinstance(element, int | float) and not isinstance(element, bool):
            _check_bounds(opt, element)
    if isinstance(value, tuple):
        _check_length(opt, len(value))
        members = typing.get_args(opt.type) if typing.get_origin(opt.type) in UNIONS else ()
        if (int in members and len(set(value)) == 1) or (float in members and len(value) == 1):
            return value[0]  # one number stands for as many equal ones
    return value


# --- ranges ---------------------------------------------------------------------------------------

_BOUNDS = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _check_bounds(opt: Option, value: float) -> None:
    for kind, (holds, words) in _BOUNDS.items():
        bound = opt.bounds[kind]
        if bound is not None and not holds(value, bound):
            instead = _OUTSIDE.get((opt.name, kind), "")
            raise OptionError(opt.name, f"must be {words} {bound}, got {shown(value)}{instead}")
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise OptionError(opt.name, f"must be a number of 64 bits, got {shown(value)}")


def _check_text(opt: Option, text: str) -> None:
    """What no name of a file and no log can hold."""
    if len(text) > MOST_TEXT:
        raise OptionError(opt.name, f"has {len(text):,} characters: {MOST_TEXT:,} at most")
    if "\0" in text:
        raise OptionError(opt.name, f"holds a NUL, {shown(text)}: remove it")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise OptionError(opt.name, f"isn't valid Unicode, {shown(text)}: correct it") from None


def _check_length(opt: Option, count: int) -> None:
    if opt.bounds["length"] is None:
        return
    least, most = opt.bounds["length"]
    if not least <= count <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        hint = _CHANNELS if opt.name == "input_size" else ""
        raise OptionError(opt.name, f"takes {wanted} values, got {count}{hint}")


# --- types: each function raises ValueError where ``raw`` is no value of its type -----------------


def _as_type(tp: Any, raw: Any) -> Any:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in UNIONS:
        return _as_member(args, raw)
    if origin is Literal:
        return _as_choice(args, raw)
    if origin is tuple:
        return _as_tuple(args[0], raw)
    return _PLAIN_TYPES[tp](raw)


def _as_member(members: tuple[Any, ...], raw: Any) -> Any:
    # None and named values first: str would take anything.
    named = [tp for tp in members if tp is types.NoneType or typing.get_origin(tp) is not None]
    for tp in (*named, *(tp for tp in members if tp not in named)):
        try:
            return _as_type(tp, raw)
        except ValueError:
            continue
    raise ValueError


def _as_choice(choices: tuple[str, ...], raw: Any) -> str:
    # YAML 1.1 reads a bare off/on as a truth value.
    text = {False: "off", True: "on"}[raw] if isinstance(raw, bool) else _as_text(raw)
    if text not in choices:
        raise ValueError
    return text


def _as_tuple(element: Any, raw: Any) -> tuple[Any, ...]:
    if isinstance(raw, list | tuple):
        parts = raw
    elif isinstance(raw, str) and element is not str:
        parts = raw.replace(",", " ").split()
    else:
        parts = [raw]
    return tuple(_as_type(element, part) for part in parts)


def _as_none(raw: Any) -> None:
    if raw is not None and not (isinstance(raw, str) and raw.lower() in ("none", "null", "")):
        raise ValueError


def _as_bool(raw: Any) -> bool:
    text = str(raw).lower() if isinstance(raw, bool) else _as_text(raw).lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ValueError


def _as_int(raw: Any) -> int:
    value = _as_float(raw)
    if value != int(value):
        raise ValueError
    # Not by way of a float, which has 53 bits only.
    digits = isinstance(raw, int) or (isinstance(raw, str) and raw.lstrip("+-").isdigit())
    return int(raw) if digits else int(value)


def _as_float(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError
    try:
        value = float(raw)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(value):
        raise ValueError
    return value


def _as_text(raw: Any) -> str:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError
    return str(raw)


_PLAIN_TYPES = {
    types.NoneType: _as_none,
    bool: _as_bool,
    int: _as_int,
    float: _as_float,
    str: _as_text,
}
