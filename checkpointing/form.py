"""Whether what a checkpoint holds has the form in which this project writes it.

Files may hold anything: what is checked here, no reader needs to doubt.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from config import background_colour, by_name, convert, is_option
from config.channel_rules import BIT_DEPTHS
from errors import CheckpointError, OptionError, first_names, printable

MOST_VALUES = 10_000_000
"""Values that a checkpoint may hold; a tensor is one."""
DEEPEST = 64
"""Levels of lists and tables in one another."""
MOST_EXPANDED = 64 << 20
"""Bytes of a tensor that is larger than what is stored of it."""
MOST_BITS = 1024
"""Bits of a whole number; states of random generators have 128."""

_TEXTS = "a list of names"
_PROBABILITIES = "a list of numbers in 0–1, one per class"
# Entries that are looked at wherever they are: what they must be, and what that is called.
FORMS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "config": (Mapping, "the options of a run"),
    "class_names": ((list, tuple), _TEXTS),
    "preprocessing": (Mapping, "a table"),
    "progress": (Mapping, "a table"),
    "metrics": (Mapping, "a table"),
    "split": (Mapping, "a table"),
    "versions": (Mapping, "a table"),
    "hub_config": (Mapping, "a table"),
    "tracking": (Mapping, "a table"),
    "bad_images": ((list, tuple), "a list"),
    "thresholds": ((list, tuple), _PROBABILITIES),
    "ema_thresholds": ((list, tuple), _PROBABILITIES),
}
# Those that other programs have too, and mean something else by: of a run of ours they are tables.
_STATE = ("model", "model_ema", "optimizer", "schedule", "scaler", "rng")
_PLAIN = (type(None), bool, int, float, str)
_HARMLESS = {type(None), bool, float, str}
# Fields of "preprocessing", and the options that may have the same values.
_PREPROCESSING = {
    "input_size": "input_size",
    "crop_ratio": "eval_crop_ratio",
    "interpolation": "interpolation",
    "mean": "mean",
    "std": "std",
}


def wrong_form(content: Mapping[Any, Any]) -> str | None:
    """What of a checkpoint is not as this project writes it, for a message; None if nothing is.

    A checkpoint of another program has none of these entries, or means something else by them. One
    of a run, which has "progress", is held to what runs write.
    """
    numbers = [key for key in content if not isinstance(key, str)]
    if numbers:
        return f"its entries have names that are no text ({_names(numbers)})"
    if problem := _wrong_values(content):
        return problem
    for name, (kind, words) in FORMS.items():
        value = content.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            return f"its {name} is {_shown(value)}, not {words}"
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            return f"its {name} has names that are no text ({_names(list(value))})"
    names = content.get("class_names")
    if names is not None and not all(isinstance(name, str) for name in names):
        return f"its class_names are {_names(list(names))}, not {_TEXTS}"
    checks = (_wrong_preprocessing, _wrong_task, _wrong_progress, _wrong_split, _wrong_run)
    return next((problem for check in checks if (problem := check(content))), None)


def _wrong_values(content: Mapping[str, Any]) -> str | None:
    """What no reader can go through, or take for a tensor with values."""
    try:
        _count(content, (), {})
    except _OddValueError as error:
        return str(error)
    return None


class _OddValueError(Exception):
    """What of a checkpoint's values no reader can take."""


def _count(value: Any, path: tuple[Any, ...], known: dict[int, int]) -> int:
    """The values in ``value``, which lies at ``path``: what is there twice counts twice.

    ``known`` are those of lists and tables that were seen, by their identity: a short file may have
    lists of the same lists, which to go through takes for ever. Raises _OddValueError.
    """
    if isinstance(value, Tensor | int):
        if problem := (_wrong_tensor if isinstance(value, Tensor) else _wrong_int)(value):
            raise _OddValueError(f"its {'.'.join(map(shortened, path))} is {problem}")
        return 1
    inner = _inside(value)
    if inner is None or id(value) in known:
        return known.get(id(value), 1)
    if len(path) > DEEPEST:
        where = shortened(path[0])
        raise _OddValueError(f"its {where} is nested more than {DEEPEST} levels deep")
    found = 1
    for key, each in inner:
        found += 1 if type(each) in _HARMLESS else _count(each, (*path, key), known)
        if found > MOST_VALUES:
            raise _OddValueError(f"it holds more than {MOST_VALUES} values")
    known[id(value)] = found
    return found


def _inside(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """What a value is made of, with a name for each; None of a plain one."""
    if isinstance(value, list | tuple | set | frozenset):
        return iter(enumerate(value))
    if isinstance(value, Mapping):
        return iter(value.items())
    return iter(vars(value).items()) if isinstance(value, argparse.Namespace) else None


def _wrong_int(value: int) -> str | None:
    return f"a number of {value.bit_length()} bits" if value.bit_length() > MOST_BITS else None


def _wrong_tensor(value: Tensor) -> str | None:
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_quantized:
        return "a quantised tensor"
    if value.device.type == "meta":
        return "a tensor without values (meta)"
    # A spread one (DTensor) has no storage of its own.
    if type(value) in (Tensor, torch.nn.Parameter):
        size = value.numel() * value.element_size()
        if size > max(MOST_EXPANDED, value.untyped_storage().nbytes()):
            return (
                f"a tensor of {size} bytes, of which {value.untyped_storage().nbytes()} are there"
            )
    return None


def _wrong_preprocessing(content: Mapping[str, Any]) -> str | None:
    values = content.get("preprocessing")
    if values is None:
        return None
    missing = [name for name in _PREPROCESSING if name not in values]
    if missing:
        return f"its preprocessing has no {', '.join(missing)}"
    for name, option in (*_PREPROCESSING.items(), *((x, x) for x in ("crop_mode", "background"))):
        if name in values and (problem := _wrong_value(option, values[name])):
            return f"the {name} of its preprocessing{problem}"
    if len(values["mean"]) != len(values["std"]):
        return "its preprocessing has means and stds of different numbers of channels"
    depth = values.get("bit_depth", BIT_DEPTHS[0])
    if type(depth) is not int or depth not in BIT_DEPTHS:
        return f"the bit_depth of its preprocessing is {_shown(depth)}"
    return None


def _wrong_value(option: str, value: Any) -> str | None:
    """What is wrong with a field of "preprocessing" that is as the value of an option."""
    value = tuple(value) if isinstance(value, list) else value
    if not _is_plain(value):
        return f" is {_shown(value)}"
    try:
        converted = convert(by_name(option), value)
        if option == "background":
            background_colour(converted)
    except OptionError as error:
        return f": {printable(error.message)}" if len(error.message) < 200 else " is another"
    # Options take text for a number, none, and one value for all channels.
    kind = tuple if option in ("mean", "std") else str if isinstance(converted, str) else float
    if option == "input_size":
        sides = value if isinstance(value, tuple) else (value, value)
        fits = len(sides) == 2 and all(type(side) is int for side in sides)
        return None if fits else f" is {_shown(value)}"
    fits = isinstance(value, kind) or (kind is float and type(value) is int)
    return None if fits else f" is {_shown(value)}"


def _wrong_task(content: Mapping[str, Any]) -> str | None:
    options = content.get("config") or {}
    ours = "preprocessing" in content and "task" in options  # elsewhere it may mean anything
    if ours and (problem := _wrong_value("task", options["task"])):
        return f"the task of its config{problem}"
    for name in ("thresholds", "ema_thresholds"):
        values = content.get(name)
        if values is None:
            continue
        count = len(content.get("class_names") or ())
        fits = all(isinstance(x, float) and 0 <= x <= 1 for x in values)
        if not fits or len(values) != count:
            return f"its {name} are not {_PROBABILITIES}"
    return None


def _wrong_progress(content: Mapping[str, Any]) -> str | None:
    progress = content.get("progress")
    if progress is None:
        return None
    wrong = [n for n in ("epoch", "samples") if not _is_count(progress.get(n))]
    return f"its progress has no {' and no '.join(wrong)}" if wrong else None


def _wrong_split(content: Mapping[str, Any]) -> str | None:
    split = content.get("split")
    if split is None:
        return None
    numbers = split.get("held_out")
    kinds = (torch.int64, torch.int32)
    fits: dict[str, Callable[[Any], bool]] = {
        "seed": lambda value: type(value) is int,
        "train": _is_count,
        "held_out": lambda x: isinstance(x, Tensor) and x.ndim == 1 and x.dtype in kinds,
    }
    wrong = [n for n, fit in fits.items() if split.get(n) is not None and not fit(split[n])]
    if wrong == ["held_out"] and isinstance(numbers, Tensor):
        return f"the held_out of its split is {tuple(numbers.shape)} {numbers.dtype}, not numbers"
    return f"the {wrong[0]} of its split is {_shown(split[wrong[0]])}" if wrong else None


def _wrong_run(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the other entries of a run's checkpoint."""
    if content.get("progress") is None:
        return None
    for name in _STATE:
        value = content.get(name)
        if value is not None and not isinstance(value, Mapping):
            return f"its {name} is {_shown(value)}, not a table"
    for name in ("progress", "schedule", "scaler"):
        for key, value in (content.get(name) or {}).items():
            if not _is_plain(value, (type(None), bool, int, float)):
                return f"the {shortened(key)} of its {name} is {_shown(value)}, not a number"
    for name in ("config", "metrics", "versions", "hub_config", "tracking"):
        for key, value in (content.get(name) or {}).items():
            if not _is_plain(value):
                return f"the {shortened(key)} of its {name} is {_shown(value)}"
    odd = [line for line in content.get("bad_images") or () if not isinstance(line, str)]
    return f"its bad_images are {_names(odd)}, not lines of text" if odd else None


def check_options(source: object, options: Mapping[str, Any]) -> None:
    """Raise CheckpointError if an option of a checkpoint ``source`` has no possible value."""
    for name, value in options.items():
        if is_option(name):
            try:
                convert(by_name(name), value)
            except OptionError as error:
                raise CheckpointError(
                    f"checkpoint {source}: an option in it is wrong: {printable(str(error))}"
                ) from None


def _is_plain(value: Any, kinds: tuple[type, ...] = _PLAIN, seen: set[int] | None = None) -> bool:
    """Whether a value is of these types, or lists and tables of such.

    ``seen`` are lists and tables that were looked at: a short file may have lists of the same ones.
    """
    if not isinstance(value, Mapping | list | tuple):
        return isinstance(value, kinds)
    seen = set() if seen is None else seen
    if id(value) in seen:
        return True  # or this has ended already
    seen.add(id(value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v, kinds, seen) for k, v in value.items())
    return all(_is_plain(v, kinds, seen) for v in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _names(values: list[Any]) -> str:
    return first_names([shortened(value) for value in values])


def shortened(value: Any) -> str:
    """A value as a message can show it, on one line and in a few words."""
    text = printable(str(value)) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"
    return text if len(text) < 40 else f"{text[:36]} …"


def _shown(value: Any) -> str:
    """A value for a message, and what it is."""
    few = isinstance(value, list | tuple) and len(value) < 9
    if not all(isinstance(x, _PLAIN) for x in (value if few else [value])):
        return f"a {type(value).__name__}"
    text = printable(repr(value))
    return f"{type(value).__name__} {text}" if len(text) < 40 else f"a {type(value).__name__}"
