"""CSV: a file that lists image paths and labels."""

import logging
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from errors import (
    DataError,
    OptionError,
    did_you_mean,
    first_names,
    os_error_text,
    shortened,
    shown,
)
from outputs.names import from_csv_cell
from pipeline.sources.base import Drawn, FileSource, PartOf, Source, Subset, data_root, held_out
from pipeline.sources.labels import (
    Labels,
    check_class_columns,
    class_names,
    lists_taken_for_names,
    multi_hot,
    read_labels,
)
from pipeline.sources.layout import part_named, split_roles
from pipeline.sources.lookup import ImageFiles, where_it_lies
from pipeline.sources.scan import listing, suffix
from pipeline.sources.tables import (
    Table,
    find_columns,
    first_line,
    named_column,
    no_labels,
    parts_of,
    read_table,
)

if TYPE_CHECKING:
    from config import DataOptions

logger = logging.getLogger(__name__)

_SHOWN = 3  # lines that a message names
_MISSING_SHOWN = 10
_FILLERS = ("label", "labels", "list", "annotation", "annotations", "metadata", "csv")


class _Listed(NamedTuple):
    """The images of a CSV file, in its order."""

    path: Path
    table: Table
    files: ImageFiles
    paths: list[str]
    labels: list[str] | list[Labels] | None
    """One of each image, or several; None: the file has no labels."""
    parts: list[str] | None
    """"train", "val" or "test" of each image by its column; None: there is no such column."""
    split_column: str
    """The name of that column."""
    class_columns: list[str] | None = None
    """The classes of which each has a column."""
    label_column: int | None = None
    """Where the labels stand."""

    def has_part(self, *names: str) -> bool:
        return self.parts is not None and any(name in self.parts for name in names)

    @property
    def val_part(self) -> str | None:
        """Which of its rows are for validation."""
        return next((name for name in ("val", "test") if self.has_part(name)), None)

    @property
    def names_both(self) -> bool:
        """Whether its column names a training and a validation part."""
        return bool(self.val_part) and self.has_part("train")


def _read(path: Path, data: "DataOptions", *, several: bool = True) -> _Listed:
    """The list in a file; with ``several`` as False cells of several labels stay as they are."""
    files = ImageFiles(_image_root(path, data), anywhere=bool(data.image_root))

    def exists(name: str) -> bool:
        return bool(files.find(name))

    table = read_table(path, exists)
    columns = find_columns(table, data, exists)
    labels: list[str] | list[Labels] | None = None
    classes = None
    if columns.label is not None:
        labels = list(map(from_csv_cell, table.column(columns.label)))
    if several and data.task == "multilabel":
        labels, classes = read_labels(table, columns, labels, data)
    return _Listed(
        path,
        table,
        files,
        table.column(columns.path),
        labels,
        None if columns.split is None else parts_of(table, columns.split),
        "" if columns.split is None else table.header[columns.split],
        classes,
        columns.label,
    )


def _image_root(path: Path, data: "DataOptions") -> Path:
    """The folder that the paths in the file are relative to. Raises OptionError."""
    if not data.image_root:
        return path.parent
    root = Path(os.path.expanduser(data.image_root))
    try:
        there = root.is_dir()
    except OSError as error:
        raise OptionError("image_root", os_error_text(error, root)) from None
    if not there:
        raise OptionError("image_root", f"{root} is no folder: give the one that holds the images")
    return root


def _source(listed: _Listed, data: "DataOptions", classes: list[str] | None = None) -> FileSource:
    """All images of the file. Raises DataError for images and labels that can't be used."""
    labels, numbers = listed.labels, listed.table.numbers
    if labels is None:
        raise DataError(no_labels(listed.table))
    classes = _classes(listed) if classes is None else classes
    paths, findings = _found(listed, data.on_bad_image)
    targets: Sequence[int] | np.ndarray
    if data.task == "multilabel":
        check_class_columns(listed.path, listed.class_columns, classes)
        targets = multi_hot(labels, classes, lambda index: f"{listed.path}, line {numbers[index]}")
    else:
        targets = _one_each(listed, labels, classes)
    source = FileSource(listed.files.root, paths, targets, classes)
    source.findings = (*findings, *_repeated(listed.path, paths, labels), *_doubts(listed))
    return source


def _doubts(listed: _Listed) -> list[str]:
    """What is odd about the column of labels."""
    labels, path, header = listed.labels, listed.path, listed.table.header
    if not labels or not isinstance(labels[0], str):
        return []
    column = "column 2" if header is None else header[listed.label_column]
    if len(labels) > 1 and len(set(labels)) == len(labels):
        return [
            f"{path}: {column} has another label for each image: if it is a number of the image, "
            "or a quantity, name the classes with --label-column"
        ]
    return lists_taken_for_names(path, shortened(column), labels)


def _one_each(listed: _Listed, labels: list[str], classes: list[str]) -> list[int]:
    """The class of each image. Raises DataError for a label that is none."""
    label_of = {name: label for label, name in enumerate(classes)}
    for number, label in zip(listed.table.numbers, labels, strict=True):
        if label not in label_of:
            hint = did_you_mean(label, label_of)
            raise DataError(
                f"{listed.path}, line {number}: no class {shown(label)} in the training part"
                + (hint and f"; {hint}")
            )
    return [label_of[label] for label in labels]


def _classes(listed: _Listed) -> list[str]:
    """The classes of a file with labels. Raises DataError where no image has one."""
    if listed.class_columns is not None:
        return listed.class_columns
    labels = listed.labels
    names = labels if isinstance(labels[0], str) else [name for row in labels for name in row]
    if not names:
        raise DataError(f"{listed.path}: no image has a label")
    return class_names(names)


def _found(listed: _Listed, on_bad_image: str) -> tuple[list[str], list[str]]:
    """The paths of the images from their root, and what the user should know.

    Raises DataError where names fit several files, or none and ``on_bad_image`` isn't "skip".
    """
    root = listed.files.root
    paths, missing, several = [], [], []
    for number, name in zip(listed.table.numbers, listed.paths, strict=True):
        found = listed.files.find(name)
        paths.append(found[0] if found else name)
        if not found:
            missing.append((number, name))
        elif len(found) > 1:
            several.append(f"{shortened(name)} (line {number}: {first_names(found, 3)})")
    if several:
        raise DataError(
            f"{listed.path}: {len(several)} names fit more than one file below {root}: "
            f"{first_names(several, _SHOWN)}: write the whole name, with folder and extension"
        )
    if not missing:
        return paths, []
    lines = [f"{shortened(name)} (line {number})" for number, name in missing]
    what = (
        f"{listed.path}: {len(missing)} of {len(paths)} images are missing below {root}: "
        f"{first_names(lines, _MISSING_SHOWN)}"
    )
    if on_bad_image == "skip" and len(missing) < len(paths):
        return paths, [what]
    fix = _where_they_are([name for _, name in missing], listed)
    if len(missing) < len(paths):
        fix += (
            "; --on-bad-image skip goes on without them, and python -m tools.data explore with it "
            "lists them all"
        )
    raise DataError(f"{what}: {fix}")


def _where_they_are(names: list[str], listed: _Listed) -> str:
    """What to do about missing images."""
    name = names[0]
    others = listed.files.find(os.path.splitext(name)[0])
    if others:
        return f"there is {others[0]}: correct the extensions in the list, or leave them out"
    folder = where_it_lies(name, listed.path.parent)
    last = where_it_lies(names[-1], listed.path.parent)
    if folder is not None and last is not None:
        found = {listed.files.root} if len(names) < len(listed.paths) else set()
        if not os.path.dirname(name) and len(places := {folder, last, *found}) > 1:
            # Names alone are looked for in all folders below.
            folder = os.path.commonpath([place.resolve() for place in places])
        return f"{shortened(name)} lies in {folder}: add --image-root {shlex.quote(str(folder))}"
    if name.startswith(("http://", "https://", "s3://", "gs://")):
        return "these are addresses: download the images, and list the files"
    if name.startswith("/") or name[1:3] in (":\\", ":/"):
        return "the paths of another machine? List them from a folder, and give it as --image-root"
    return "give --image-root, or correct the list"


def _repeated(path: Path, paths: list[str], labels: list[str]) -> list[str]:
    """What the user should know of images that are listed more than once."""
    again = {name for name, count in Counter(paths).items() if count > 1}
    if not again:
        return []
    pairs = {(n, label) for n, label in zip(paths, labels, strict=True) if n in again}
    torn = sum(count > 1 for count in Counter(name for name, _ in pairs).values())
    several = not isinstance(labels[0], str)
    how = "with different labels" if several else "under more than one class"
    under = f", {torn} of them {how}" if torn else ""
    fix = ": write all labels of an image into one row" if torn and several else ""
    return [
        f"{path}: {len(again)} images are listed more than once{under} "
        f"({first_names(sorted(again), 2)}){fix}"
    ]


def _tables(root: Path) -> dict[str, str]:
    """The CSV files in a folder that stand for a part, by name, and which."""
    names = [name for name in listing(root).files if suffix(name) in (".csv", ".tsv")]
    roles = split_roles([Path(name).stem for name in names], _FILLERS)
    return {name: roles[Path(name).stem] for name in names if Path(name).stem in roles}


def _usual(role: str) -> list[str]:
    stems = ("val", "valid", "validation") if role == "val" else (role,)
    return [f"{stem}.csv" for stem in stems]


def _training_file(root: Path) -> Path:
    """Raises OptionError where there is none."""
    if root.is_file():
        return root
    name = part_named("train", _tables(root), _usual("train"), root)
    if name is None:
        others = [n for n in listing(root).files if suffix(n) in (".csv", ".tsv")]
        table = shlex.quote(str(root / others[0])) if others else ""
        hint = f", e.g. --data-path {table} --val-fraction 0.1" if others else ""
        raise OptionError(
            "data_path",
            f"{root / 'train.csv'} does not exist: give a CSV file, or its folder{hint}",
        )
    return root / name


def _validation_file(root: Path, data: "DataOptions") -> tuple[_Listed | None, list[str]]:
    """The list of the validation part in a folder; what is wrong with files of that name."""
    unusable = []
    if root.is_file():
        return None, unusable
    roles = _tables(root)
    for role in ("val", "test"):
        name = part_named(role, roles, _usual(role), root)
        if name is None:
            continue
        listed = _read_labelled(root / name, data)
        if listed is not None:
            return listed, []
        unusable.append(f"{root / name} has no labels (Kaggle's test set?)")
    return None, unusable


def _read_labelled(path: Path, data: "DataOptions") -> _Listed | None:
    """The list in a file; None for one without labels."""
    first = first_line(path)
    if not any(mark in first for mark in ",;\t|"):
        return None
    listed = _read(path, data)
    return None if listed.labels is None else listed


def csv_set(data: "DataOptions", seed: int) -> PartOf:
    """train.csv and val.csv of a folder, or one file with a column that says train, val or test,
    or of which a share is held out.

    Paths are relative to ``--image-root``, else to the CSV file.
    """
    root = data_root(data)
    train = _read(_training_file(root), data)
    val, unusable = _validation_file(root, data)
    own = f"{train.path}: its column {train.split_column}"
    if val is not None and train.val_part:
        raise OptionError(
            "data_path",
            f"{own} and {val.path} both name a validation part: give one file alone, "
            "or add --split-column none",
        )
    if val is None and not train.names_both:
        drawn = _drawn(train, unusable, data, seed)
        return lambda is_train: drawn if is_train else drawn.other_part()
    if data.val_fraction is not None:
        where = f"{own} names a validation part" if val is None else f"{root} has {val.path.name}"
        column = ", or add --split-column none to draw one" if val is None else ""
        alone = f", or give {train.path} alone" if val is not None else ""
        raise OptionError("val_fraction", f"{where}: leave it out{column}{alone}")
    source = _source(train, data)
    if val is None:
        return lambda is_train: _part(source, train, "train" if is_train else train.val_part)
    return lambda is_train: source if is_train else _source(val, data, source.classes)


def _part(source: FileSource, listed: _Listed, part: str) -> Source:
    """The rows of one part."""
    if part == "train" and listed.val_part == "val" and listed.has_part("test"):
        logger.info("%s: its rows of the test part are not used", listed.path)
    return Subset(source, np.flatnonzero(np.array(listed.parts) == part))


def _drawn(train: _Listed, unusable: list[str], data: "DataOptions", seed: int) -> Drawn:
    """The training part of a file of which a share is held out."""
    if data.val_fraction is None:
        why = f"{'; '.join(unusable)}: " if unusable else ""
        raise OptionError(
            "val_fraction",
            f"{why}{train.path} has no val.csv beside it and no column that says train or val: "
            "add --val-fraction 0.1",
        )
    source = _source(train, data)
    source.findings = (*(f"{text}: it isn't used" for text in unusable), *source.findings)
    return held_out(source, True, data.val_fraction, seed)


def _part_alone(data: "DataOptions") -> _Listed | None:
    """The CSV file of a set without a training part, or a file that names both parts; None for
    other sets."""
    root = data_root(data)
    if root.is_file():
        return None if data.val_fraction is not None else _read(root, data)
    if "train" in _tables(root).values():
        return None
    val, unusable = _validation_file(root, data)
    if val is None and unusable:
        raise OptionError(
            "data_path", f"{'; '.join(unusable)}: python -m tools.predict classifies without them"
        )
    return val


def csv_validation_part(data: "DataOptions", classes: list[str]) -> Source | None:
    """A CSV file without a training part, for a model that knows its classes; of a file with both
    parts, that for validation."""
    part = _part_alone(data)
    if part is not None and part.names_both:
        return _part(_source(part, data), part, part.val_part)
    return None if part is None else _source(part, data, classes)


def csv_classes(data: "DataOptions") -> list[str] | None:
    """The labels in the CSV file of a set without a training part; None for other sets."""
    part = _part_alone(data)
    if part is None or part.names_both:
        return None
    if part.labels is None:
        raise DataError(no_labels(part.table))
    return _classes(part)


def values_of_column(data: "DataOptions", name: str, option: str) -> dict[str, str]:
    """The value of the column ``name`` of a CSV file for each image, by its path.

    Raises OptionError about ``option`` for a column that isn't there, and DataError for a row
    without a value and for an image with two.
    """
    listed = _read(_training_file(data_root(data)), data, several=False)
    if listed.table.header is None:
        raise OptionError(option, f"{listed.path} has no header: write the names of its columns")
    if data.task == "multilabel" and listed.labels is None and not data.label_columns:
        flag = option.replace("_", "-")
        raise OptionError(
            "label_columns",
            f"the column {shown(name)} would be taken for a class, and --{flag} goes by it: name "
            "the columns of classes",
        )
    values = listed.table.column(named_column(listed.table, option, name))
    paths, _ = _found(listed, data.on_bad_image)
    found: dict[str, str] = {}
    for number, path, value in zip(listed.table.numbers, paths, values, strict=True):
        where = f"{listed.path}, line {number}"
        if not value:
            raise DataError(f"{where}: no {shown(name)}: give the image a group of its own, or one")
        before = found.setdefault(os.path.join(listed.files.root, path), value)
        if before != value:
            raise DataError(
                f"{where}: {shortened(path)} is of {shown(value)} here, of {shown(before)} above"
            )
    return found
