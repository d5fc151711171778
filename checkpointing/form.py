"""Whether what a checkpoint says of itself has the form in which this project writes it."""

from collections.abc import Mapping
from typing import Any

from config import by_name, convert
from errors import OptionError, first_names

_TEXTS = "a list of names"
# Entries that are looked at wherever they are: what they must be, and what that is called.
FORMS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "config": (Mapping, "the options of a run"),
    "class_names": ((list, tuple), _TEXTS),
    "preprocessing": (Mapping, "a table"),
    "progress": (Mapping, "a table"),
    "metrics": (Mapping, "a table"),
    "split": (Mapping, "a table"),
    "versions": (Mapping, "a table"),
    "bad_images": ((list, tuple), "a list"),
}
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

    A checkpoint of another program has none of these entries, or means something else by them.
    """
    numbers = [key for key in content if not isinstance(key, str)]
    if numbers:
        return f"its entries have names that are no text ({first_names(numbers)})"
    for name, (kind, words) in FORMS.items():
        value = content.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            return f"its {name} is {_shown(value)}, not {words}"
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            return f"its {name} has names that are no text ({first_names(list(value))})"
    names = content.get("class_names")
    if names is not None and not all(isinstance(name, str) for name in names):
        return f"its class_names are {first_names(list(names))}, not {_TEXTS}"
    return _wrong_preprocessing(content.get("preprocessing")) or _wrong_progress(content)


def _wrong_preprocessing(values: Mapping[str, Any] | None) -> str | None:
    if values is None:
        return None
    missing = [name for name in _PREPROCESSING if name not in values]
    if missing:
        return f"its preprocessing has no {', '.join(missing)}"
    for name, option in (*_PREPROCESSING.items(), *((x, x) for x in ("crop_mode", "background"))):
        if name not in values:
            continue
        try:
            convert(by_name(option), values[name])
        except OptionError as error:
            return f"the {name} of its preprocessing: {error.message}"
    return None


def _wrong_progress(content: Mapping[str, Any]) -> str | None:
    progress = content.get("progress")
    if progress is None:
        return None
    wrong = [n for n in ("epoch", "samples") if type(progress.get(n)) is not int]
    return f"its progress has no {' and no '.join(wrong)}" if wrong else None


def _shown(value: Any) -> str:
    """A value for a message, and what it is."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) < 40 else f"a {type(value).__name__}"
