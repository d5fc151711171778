"""Several labels per image: how lists write them, and how a share is held out."""

import ast
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import DataError, OptionError, did_you_mean, first_names, shortened, shown
from pipeline.sources.tables import NO, YES, Columns, Table

if TYPE_CHECKING:
    from config import DataOptions

logger = logging.getLogger(__name__)

Labels = tuple[str, ...]
"""The labels of an image, each once."""

MOST_NAME = 1000  # characters of a label
MOST_BYTES = 8 << 30  # of the table of images × classes
_WORDS = {"space": " ", "comma": ",", "semicolon": ";", "bar": "|", "tab": "\t"}
_USUAL = ("|", ";", ",")
_NONE = (*NO, "", "nan")
_SHOWN = 10


def multi_hot(
    labels: Sequence[Labels], classes: Sequence[str], where: Callable[[int], str]
) -> np.ndarray:
    """Which of the classes each image has, (N, K) uint8.

    ``where`` says where the labels of an image stand. Raises DataError for a label that is no
    class, and for a table that is too large.
    """
    size = len(labels) * len(classes)
    if size > MOST_BYTES:
        raise DataError(
            f"{len(labels):,} images × {len(classes):,} classes make a table of {size >> 30} GiB, "
            f"{MOST_BYTES >> 30} at most: leave rare classes out"
        )
    place = {name: number for number, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes)), dtype=np.uint8)
    for index, names in enumerate(labels):
        for name in names:
            if name not in place:
                raise DataError(f"{where(index)}: no class {shown(name)} in the training part")
            targets[index, place[name]] = 1
    return targets


def class_names(labels: Sequence[str]) -> list[str]:
    """The labels in the order of their numbers, or of the letters."""
    names = sorted(set(labels))  # 01 and 1 are two names of one number
    # int() refuses longer ones.
    numeric = all(re.fullmatch("-?[0-9]{1,4000}", name) for name in names)
    return sorted(names, key=int) if numeric else names


def named(numbers: Sequence[int], classes: Sequence[str], where: str) -> Labels:
    """The labels of these numbers. Raises DataError, which says ``where``, for one of no class."""
    if wrong := [number for number in numbers if not 0 <= number < len(classes)]:
        raise DataError(f"{where}: label {wrong[0]} is none of {len(classes)} classes")
    return each_once([classes[number] for number in numbers])


def each_once(names: Sequence[str]) -> Labels:
    """Labels without repetitions and empty ones."""
    return tuple(dict.fromkeys(name for name in names if name))


def read_labels(
    table: Table, columns: Columns, cells: list[str] | None, data: "DataOptions"
) -> tuple[list[Labels] | None, list[str] | None]:
    """The labels of each row, and the classes where each has a column.

    None for a table without labels. ``cells`` are those of the column of labels, if there is one.
    """
    if cells is not None:
        return labels_of_cells(table, columns.label, cells, data.label_separator), None
    if table.header is None:
        return None, None
    found = class_columns(table, data, (columns.path, columns.split))
    return (
        (labels_of_columns(table, found), [table.header[i] for i in found])
        if found
        else (
            None,
            None,
        )
    )


def check_class_columns(path: Path, columns: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Raise DataError if a file lacks the column of a class: nothing says that it is absent."""
    lacking = [] if columns is None else [name for name in classes if name not in columns]
    if lacking:
        raise DataError(f"{path} has no column of {len(lacking)} classes: {first_names(lacking)}")


# --- one column -----------------------------------------------------------------------------------


def labels_of_cells(table: Table, column: int, cells: Sequence[str], option: str) -> list[Labels]:
    """The labels in the cells of one column; an empty one has none.

    Args:
        table: for messages.
        column: its place.
        cells: its texts.
        option: ``--label-separator``.

    Raises OptionError where the separator is not clear, DataError for a cell that can't be read.
    """
    separator = _WORDS.get(option, option)
    name = "" if table.header is None else table.header[column]
    if not separator:
        separator = _clear_separator(table.path, name, cells)
        words = {"json": "JSON lists", "none": "one label each"}
        what = words.get(separator, f"labels between {separator!r}")
        logger.info("%s: the cells of %s hold %s", table.path, name or "column 2", what)
    found = []
    for number, cell in zip(table.numbers, cells, strict=True):
        try:
            labels = _split(cell, separator)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise DataError(
                f"{table.path}, line {number}: {shown(shortened(cell))} is no list of labels: "
                "correct it, or say what separates them with --label-separator"
            ) from None
        if any(len(label) > MOST_NAME for label in labels):
            raise DataError(
                f"{table.path}, line {number}: a label of more than {MOST_NAME} characters: is "
                "--label-separator right?"
            )
        found.append(each_once(labels))
    return found


def _split(cell: str, separator: str) -> list[str]:
    """The labels in a cell. Raises ValueError or SyntaxError."""
    if separator == "json":
        return list_of_labels(cell) if cell else []
    if separator == "none":
        return [cell]
    return [part.strip() for part in cell.split(separator)]


def list_of_labels(text: str) -> list[str]:
    """The labels of a list as JSON or Python write it. Raises ValueError or SyntaxError."""
    try:
        values = json.loads(text)
    except ValueError:
        values = ast.literal_eval(text)  # as pandas writes lists; constants alone
    return label_texts(values)


def label_texts(values: Any) -> list[str]:
    """The names or numbers of a list as texts. Raises ValueError for anything else."""
    if not isinstance(values, list | tuple):
        raise ValueError("not a list")
    if not all(type(value) in (str, int) for value in values):
        raise ValueError("not a list of names or numbers")
    return [str(value).strip() for value in values]


def _clear_separator(path: Path, name: str, cells: Sequence[str]) -> str:
    """What stands between the labels in these cells. Raises OptionError where that isn't clear."""
    texts = {cell for cell in cells if cell}
    if texts and all(cell.startswith("[") and cell.endswith("]") for cell in texts):
        return "json"
    found = [mark for mark in _USUAL if any(mark in cell for cell in texts)]
    column = f"{path}: the column {shortened(name)}" if name else str(path)
    if len(found) > 1:
        marks = " and ".join(map(repr, found))
        raise OptionError("label_separator", f"{column} has {marks}: say which separates labels")
    if found:
        return found[0]
    spaced = next((cell for cell in texts if " " in cell), None)
    if spaced is None:
        return "none"
    # Few words that are combined in many ways are labels; names of two words bring their own.
    words = {word for cell in texts for word in cell.split()}
    if len(words) < len(texts) and any(word in texts for word in words):
        return " "
    raise OptionError(
        "label_separator",
        f"{column} has cells such as {shown(shortened(spaced))}: add --label-separator space, or "
        "none where that is one label",
    )


def lists_taken_for_names(path: Path, column: str, cells: Sequence[str]) -> list[str]:
    """What is said where the classes of a list seem to be lists of labels.

    That is where some labels stand alone as well, or most of them stand in several cells.
    """
    texts = set(cells)
    for mark in _USUAL:
        lists = [[part.strip() for part in cell.split(mark)] for cell in texts if mark in cell]
        parts = Counter(part for labels in lists for part in set(labels))
        known = sum(part in texts or count > 1 for part, count in parts.items())
        if lists and 2 * known >= len(parts):
            example = next(cell for cell in cells if mark in cell)
            return [
                f"{path}: {shown(shortened(example))} in {column} is taken for the name of one "
                f"class: if it is several labels, add --task multilabel"
            ]
    return []


# --- a column for each class ----------------------------------------------------------------------


def class_columns(table: Table, data: "DataOptions", taken: Sequence[int | None]) -> list[int]:
    """The columns of 0 and 1, one for each class: as ``--label-columns`` says, else all others.

    ``taken`` are those that hold something else. Raises OptionError.
    """
    rest = [i for i in range(len(table.header)) if i not in taken]
    if data.label_columns:
        return _matching(table, data.label_columns, rest)
    binary = [i for i in rest if {cell.lower() for cell in table.column(i)} <= {*YES, *_NONE}]
    others = [table.header[i] for i in rest if i not in binary]
    if others and binary:
        raise OptionError(
            "label_columns",
            f"{table.path} has no column of labels, and {first_names(others, _SHOWN)} hold more "
            "than 0 and 1: name the columns of classes, or --label-column",
        )
    if binary:
        names = [table.header[i] for i in binary]
        logger.info(
            "%s: %d columns of 0 and 1 are the classes: %s",
            table.path,
            len(names),
            first_names(names, _SHOWN),
        )
    return binary


def _matching(table: Table, patterns: Sequence[str], rest: Sequence[int]) -> list[int]:
    found: dict[int, None] = {}
    for pattern in patterns:
        named = [i for i in rest if table.header[i] == pattern]
        named = named or [i for i in rest if fnmatchcase(table.header[i], pattern)]
        if not named:
            names = [table.header[i] for i in rest]
            hint = did_you_mean(pattern, names, otherwise=f"it has {first_names(names, _SHOWN)}")
            raise OptionError("label_columns", f"{table.path} has no column {pattern}; {hint}")
        found |= dict.fromkeys(named)
    return sorted(found)


def labels_of_columns(table: Table, columns: Sequence[int]) -> list[Labels]:
    """The names of those columns that say 1, for each row. Raises DataError for another value."""
    names = [table.header[i] for i in columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{table.path}, line 1: more than one column is named {shown(twice)}")
    found = []
    for number, row in zip(table.numbers, table.rows, strict=True):
        labels = []
        for index, name in zip(columns, names, strict=True):
            value = row[index].lower()
            if value in YES:
                labels.append(name)
            elif value not in _NONE:
                raise DataError(
                    f"{table.path}, line {number}: {shortened(name)} is {shown(row[index])}, not "
                    "0 or 1: correct it, or leave the column out with --label-columns"
                )
        found.append(tuple(labels))
    return found
