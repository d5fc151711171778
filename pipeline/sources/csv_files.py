"""CSV: a file that lists image paths and labels."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from errors import DataError, OptionError
from pipeline.sources.base import (
    VAL_NAMES,
    FileSource,
    Source,
    data_root,
    first_existing,
    held_out,
    refuse_val_fraction,
)

if TYPE_CHECKING:
    from config import DataOptions

_PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "file_name", "img")
_LABEL_COLUMNS = ("label", "class", "target", "category", "class_name")


def _read_csv(path: Path) -> tuple[list[str], list[str], list[int]]:
    """Image paths, labels and line numbers of a CSV file; a header is optional."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first_line.count)
    if delimiter not in first_line:
        raise DataError(f"{path}, line 1: expected two columns, an image's path and its label")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    rows = [(number, row) for number, row in rows if any(row)]
    width, columns = len(rows[0][1]), _csv_columns(path, rows[0][1])
    if columns is None:
        columns = (0, 1)
        if width != 2 or not (path.parent / rows[0][1][0]).exists():
            raise DataError(
                f"{path}, line 1: neither a header (path{delimiter}label) nor "
                "an image that exists and its label"
            )
    else:
        rows = rows[1:]
    for number, row in rows:
        if len(row) != width:
            raise DataError(f"{path}, line {number}: {len(row)} columns instead of {width}")
        for column, what in zip(columns, ("path", "label"), strict=True):
            if not row[column]:
                raise DataError(f"{path}, line {number}: no {what}")
    if not rows:
        raise DataError(f"{path} has no images")
    paths, labels = ([row[column] for _, row in rows] for column in columns)
    return paths, labels, [number for number, _ in rows]


def _csv_columns(path: Path, header: list[str]) -> tuple[int, int] | None:
    names = [name.lower() for name in header]
    found = [
        next((names.index(n) for n in usual if n in names), None)
        for usual in (_PATH_COLUMNS, _LABEL_COLUMNS)
    ]
    if found == [None, None]:
        return None
    for column, usual in zip(found, (_PATH_COLUMNS, _LABEL_COLUMNS), strict=True):
        if column is None:
            raise DataError(f"{path}, line 1: no column named {', '.join(usual[:4])}")
    return found[0], found[1]


def _csv_source(path: Path, classes: list[str] | None = None) -> FileSource:
    paths, labels, numbers = _read_csv(path)
    if classes is None:
        numeric = all(label.lstrip("-").isdigit() for label in labels)
        classes = sorted(set(labels), key=int if numeric else None)
    label_of = {name: label for label, name in enumerate(classes)}
    for number, label in zip(numbers, labels, strict=True):
        if label not in label_of:
            raise DataError(f"{path}, line {number}: no class {label!r} in the training part")
    return FileSource(path.parent, paths, [label_of[label] for label in labels], classes)


def csv_file(is_train: bool, data: "DataOptions", seed: int) -> Source:
    """train.csv and val.csv of a folder, or one file of which a share is held out.

    Paths are relative to the CSV file.
    """
    root = data_root(data)
    train = root if root.is_file() else root / "train.csv"
    if not train.is_file():
        raise OptionError("data_path", f"{train} does not exist: give a CSV file, or its folder")
    val = None if root.is_file() else first_existing(root / f"{n}.csv" for n in VAL_NAMES)
    if val is None:
        if data.val_fraction is None:
            raise OptionError(
                "val_fraction", f"{train} has no val.csv beside it: add --val-fraction 0.1"
            )
        return held_out(_csv_source(train), is_train, data.val_fraction, seed)
    refuse_val_fraction(data, str(root))
    source = _csv_source(train)
    return source if is_train else _csv_source(val, source.classes)


def _part_alone(data: "DataOptions") -> Path | None:
    """The CSV file of a set without a training part; None for other sets."""
    root = data_root(data)
    if root.is_file():
        return root if data.val_fraction is None else None
    if (root / "train.csv").exists():
        return None
    return first_existing(root / f"{name}.csv" for name in VAL_NAMES)


def csv_validation_part(data: "DataOptions", classes: list[str]) -> Source | None:
    """A CSV file without a training part, for a model that knows its classes."""
    part = _part_alone(data)
    return None if part is None else _csv_source(part, classes)


def csv_classes(data: "DataOptions") -> list[str] | None:
    """The labels in the CSV file of a set without a training part; None for other sets."""
    part = _part_alone(data)
    return None if part is None else _csv_source(part).classes
