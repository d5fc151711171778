"""The files of ``--class-map``, ``--valid-labels`` and ``--real-labels``."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounded
from errors import OptionError, os_error_text, shortened, shown

FindClass = Callable[[str], int]
"""The index of the class that a word means; raises ValueError with the reason where none is."""

MOST_BYTES = 64 << 20  # of a file
_INDEX = re.compile(r"-?[0-9]{1,18}")


def read_class_map(file: str, find: FindClass) -> dict[str, int]:
    """The model's class of each name of ``--class-map``.

    A text file has ``NAME INDEX`` on every line, or a name whose line says the index, counted from
    0 (timm's form). JSON is ``{"NAME": INDEX}`` or a list of names; in place of an index a class
    name of the model will do. Raises OptionError for any other file.
    """
    option = "class_map"
    if Path(file).suffix.lower() == ".json":
        places = _pairs_of_json(option, file)
    else:
        lines = _lines(option, file)
        found_pairs = [_name_and_index(line) for line in lines]
        if any(found_pairs) and not all(found_pairs):
            number = found_pairs.index(None) + 1
            raise OptionError(
                option,
                f"{file}, line {number}: {shown(lines[number - 1])} has no index and other lines "
                "have one: write NAME INDEX on each",
            )
        pairs = [p for p in found_pairs if p] or [(n, str(i)) for i, n in enumerate(lines)]
        places = [(f"line {i}", name, index) for i, (name, index) in enumerate(pairs, start=1)]
    found: dict[str, int] = {}
    for place, name, index in places:
        if name in found:
            raise OptionError(
                option, f"{file}, {place}: {shown(name)} is there already: remove one"
            )
        found[name] = _found(option, file, place, index, find)
    return found


def read_valid_labels(file: str, find: FindClass) -> list[int]:
    """The model's classes of ``--valid-labels``, an index or name on each line, in that order.

    Raises OptionError for any other file.
    """
    option = "valid_labels"
    found: dict[int, int] = {}
    for number, line in enumerate(_lines(option, file), start=1):
        index = _found(option, file, f"line {number}", line, find)
        if index in found:
            raise OptionError(
                option,
                f"{file}, line {number}: {shown(line)} is the class of line {found[index]}: remove "
                "one",
            )
        found[index] = number
    return list(found)


def read_real_labels(file: str, num_classes: int) -> list[list[int]]:
    """The right classes of each validation image of ImageNet by ``--real-labels``, none for some.

    The form is that of ``real.json`` of "Are we done with ImageNet?" (arXiv:2006.07159). Raises
    OptionError for any other file, and for classes that a model of ``num_classes`` doesn't have.
    """
    option = "real_labels"
    entries = _json(option, file)
    if not isinstance(entries, list) or not entries:
        raise OptionError(
            option,
            f"{file} isn't a list of lists of class indices, one for each image: take real.json "
            "of ImageNet-ReaL",
        )
    for number, labels in enumerate(entries, start=1):
        whole = isinstance(labels, list) and all(type(label) is int for label in labels)
        if not whole:
            raise OptionError(
                option, f"{file}, entry {number}: {shown(labels)} isn't a list of class indices"
            )
        wrong = next((label for label in labels if not 0 <= label < num_classes), None)
        if wrong is not None:
            raise OptionError(
                option,
                f"{file}, entry {number}: {shown(wrong)} is no class of the model, which has 0 to "
                f"{num_classes - 1}: evaluate a model of ImageNet's 1000 classes",
            )
    return entries


def _name_and_index(line: str) -> tuple[str, str] | None:
    """The two words of a line ``NAME INDEX``; None for any other."""
    words = line.rsplit(None, 1)
    return tuple(words) if len(words) == 2 and _INDEX.fullmatch(words[1]) else None


def _found(option: str, file: str, place: str, word: str, find: FindClass) -> int:
    try:
        return find(word)
    except ValueError as error:
        raise OptionError(option, f"{file}, {place}: {shortened(str(error))}") from None


def text_of(option: str, file: str, otherwise: str = "give a .txt or .json file") -> str:
    """What the file that an option names holds; ``otherwise`` is what helps if it is no text.

    Raises OptionError.
    """
    try:
        return bounded.read_text(os.path.expanduser(file), MOST_BYTES)
    except FileNotFoundError:
        raise OptionError(option, f"{file} does not exist: name the file") from None
    except OSError as error:
        raise OptionError(option, os_error_text(error, file)) from None
    except UnicodeDecodeError:
        raise OptionError(option, f"{file} isn't text: {otherwise}") from None


def _lines(option: str, file: str) -> list[str]:
    """The lines of a text file, of which none but the last may be empty."""
    lines = [line.strip() for line in text_of(option, file).rstrip().splitlines()]
    if not lines:
        raise OptionError(option, f"{file} is empty: write a class on each line")
    if "" in lines:
        raise OptionError(option, f"{file}, line {lines.index('') + 1} is empty: remove it")
    return lines


def _json(option: str, file: str) -> Any:
    """What a JSON file holds; objects as tuples of pairs, so that a name given twice shows."""
    try:
        return bounded.parse_json(text_of(option, file), object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise OptionError(
            option, f"{file}, line {error.lineno}: not JSON ({error.msg}): correct it"
        ) from None
    except ValueError as error:
        raise OptionError(
            option, f"{file}: not JSON that can be read ({shortened(str(error))}): correct it"
        ) from None


def _pairs_of_json(option: str, file: str) -> list[tuple[str, str, str]]:
    """(place in the file, name, index or class name) of each entry."""
    content = _json(option, file)
    if isinstance(content, list):
        content = tuple((name, index) for index, name in enumerate(content))
    pairs = content if isinstance(content, tuple) else ()
    for number, (name, index) in enumerate(pairs, start=1):
        if not isinstance(name, str) or type(index) not in (int, str):
            raise OptionError(
                option,
                f"{file}, entry {number}: {shown(name)}: {shown(index)} isn't a name and an index",
            )
    if not pairs:
        raise OptionError(
            option, f'{file} holds neither {{"NAME": INDEX}} nor a list of names: write one'
        )
    return [(f"entry {i}", name, str(index)) for i, (name, index) in enumerate(pairs, start=1)]
