"""CSV tables of images: their rows, and which column holds what."""

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import bounded
from errors import (
    DataError,
    OptionError,
    did_you_mean,
    first_names,
    os_error_text,
    shortened,
    shown,
)
from pipeline.sources.layout import split_role

if TYPE_CHECKING:
    from config import DataOptions

# Names of columns, without what isn't a letter or digit, the likeliest first.
_PATH_COLUMNS = (
    ("path", "image", "file", "filename", "filepath", "imagepath", "img", "imgpath", "filepaths")
    + ("imagename", "imagefile", "imagefilename", "imgname", "imgfile", "fname", "images")
    + ("relativepath", "imagefilepath")
)
_ID_COLUMNS = ("imageid", "imgid", "id", "idcode", "imageids", "uuid", "isicid", "photoid")
_LABEL_COLUMNS = ("label", "class", "target", "category", "classname", "labels", "classes")
_OTHER_LABEL_COLUMNS = (
    ("labelname", "classlabel", "categoryname", "targetname", "breed", "species", "diagnosis", "dx")
    + ("variety", "disease", "level", "scientificname", "y", "classid", "labelid", "categoryid")
    + ("classindex",)
)
_SEVERAL_COLUMNS = ("tags", "tag", "findinglabels", "attributes", "genres")
_SPLIT_COLUMNS = ("split", "set", "subset", "fold", "dataset", "datasplit", "partition", "part")
_SPLIT_COLUMNS += ("datatype", "phase", "mode", "usage", "traintest", "traintestsplit", "kfold")
MOST_BYTES = 1 << 30  # of a table
MOST_LINE = 1 << 20  # characters
MOST_COLUMNS = 1000
MOST_CELLS = 50_000_000  # of all rows; a cell of usual length takes up to 90 bytes
MOST_NAME = {"path": 4096, "label": 1000}  # characters
_SHOWN = 30  # columns that a message names
_LAST = "\0last"
_BINARY = ("0", "1", "0.0", "1.0")
YES, NO = ("1", "true", "yes", "y", "t", "1.0"), ("0", "false", "no", "n", "f", "0.0")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


@dataclass
class Table:
    """The rows of a CSV file, all of the same width."""

    path: Path
    delimiter: str
    header: list[str] | None
    """None: the first row is an image and its label."""
    rows: list[list[str]]
    numbers: list[int]
    """The line of each row."""

    def column(self, index: int) -> list[str]:
        return [row[index] for row in self.rows]


class Columns(NamedTuple):
    """Where in a row what stands."""

    path: int
    label: int | None
    """None: the table has no labels."""
    split: int | None


def read_table(path: Path, exists: Callable[[str], bool]) -> Table:
    """Read a CSV file of images.

    Args:
        path: the file; comma, semicolon, tab or bar separates the columns.
        exists: whether there is an image of this name, by which a first row that names one is told
            from a header.

    Raises DataError, with the line, also for a table that is larger than is read.
    """
    with opened_text(path) as file:
        lines = lines_of(path, file)
        begin = [next(lines, "")]
        while begin[-1].isspace():
            begin.append(next(lines, ""))
        delimiter = max(",;\t|", key=begin[-1].count)
        if delimiter not in begin[-1]:
            raise DataError(f"{path}, line 1: expected two columns, an image's path and its label")
        numbers, rows = _rows(path, delimiter, itertools.chain(begin, lines))
    if not rows:
        raise DataError(f"{path} has no images")
    first = rows[0]
    known = (*_PATH_COLUMNS, *_ID_COLUMNS, *_LABEL_COLUMNS, *_OTHER_LABEL_COLUMNS)
    has_header = any(_plain(name) in known for name in first) and not exists(first[0])
    if not has_header and len(first) == 2 and exists(first[0]):
        header = None
    else:
        header, rows, numbers = first, rows[1:], numbers[1:]
    for number, row in zip(numbers, rows, strict=True):
        if len(row) != len(first):
            raise DataError(f"{path}, line {number}: {len(row)} columns instead of {len(first)}")
    if not rows:
        raise DataError(f"{path} has no images")
    return Table(path, delimiter, header, rows, numbers)


def first_line(path: Path) -> str:
    """The first line of a table. Raises DataError where it can't be read."""
    with opened_text(path) as file:
        return next(lines_of(path, file), "")


@contextmanager
def opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """The text of a table, for :func:`lines_of`; what can't be read in the block is a DataError."""
    try:
        with bounded.opened(path, MOST_BYTES) as file:
            yield io.TextIOWrapper(file, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(os_error_text(error, path)) from None


def lines_of(path: Path, file: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a table, with their ends. Raises DataError."""
    number = 0
    try:
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise DataError(
                    f"{path}, line {number}: more than {MOST_LINE:,} characters: is it a table?"
                )
            yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} can't be read after line {number}: {error.reason}; save it as UTF-8"
        ) from None


def _rows(path: Path, delimiter: str, lines: Iterable[str]) -> tuple[list[int], list[list[str]]]:
    """The rows that aren't empty, and the line of each. Raises DataError."""
    numbers, rows, cells = [], [], 0
    reader = csv.reader(_with_last(lines), delimiter=delimiter)
    last = begin = 1
    try:
        for row in reader:
            if row == [_LAST]:
                return numbers, rows
            cells += len(row)
            if len(row) > MOST_COLUMNS or cells > MOST_CELLS:
                break
            row = [cell.strip() for cell in row]
            if any(row):
                numbers.append(reader.line_num)
                rows.append(row)
            last, begin = begin, reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {begin}: {error}: is a quote missing, or one too many?"
        ) from None
    if len(row) > MOST_COLUMNS:
        raise DataError(
            f"{path}, line {reader.line_num}: {len(row):,} columns, and no more than "
            f"{MOST_COLUMNS:,} are read: leave those out that are not needed"
        )
    if cells > MOST_CELLS:
        raise DataError(
            f"{path} has more than {MOST_CELLS:,} cells: leave columns out, or pack the images "
            "(python -m tools.data pack)"
        )
    raise DataError(f"{path}, line {last}: a quote begins there that is never closed")


def _with_last(lines: Iterable[str]) -> Iterator[str]:
    """``lines``, all with an end, and one more, which is lost in a quote that is never closed."""
    for line in lines:
        yield line if line[-1] in "\r\n" else f"{line}\n"
    yield _LAST


def find_columns(table: Table, data: "DataOptions", exists: Callable[[str], bool]) -> Columns:
    """Which columns hold paths, labels and parts: as the options say, else by their names.

    Raises OptionError for an option that names no column, DataError where several columns fit, or
    none.
    """
    options = ("image_column", "label_column", "split_column")
    if table.header is None:
        for name in options:
            if getattr(data, name) not in ("", "none"):
                raise OptionError(name, f"{table.path} has no header")
        return Columns(0, 1, None)
    image, label, split = (named_column(table, name, getattr(data, name)) for name in options)
    if split is None and not data.split_column:
        split = _split_column(table, taken=(image, label))
    if image is None:
        image = _image_column(table, label, exists)
    several = data.task == "multilabel"
    if label is None and not data.label_columns:
        label = _label_column(table, image, split, _SEVERAL_COLUMNS if several else ())
    if image is None and label is None:
        raise DataError(
            f"{table.path}, line 1: neither a header (path{table.delimiter}label) nor an image "
            f"that exists and its label{_choices(table)}"
        )
    if image is None:
        raise DataError(
            f"{table.path}, line 1: no column named {', '.join(_PATH_COLUMNS[:4])}{_choices(table)}"
        )
    for number, row in zip(table.numbers, table.rows, strict=True):
        for column, what in ((image, "path"), (label, "label")):
            if several and what == "label":
                continue  # any number of labels, none included
            if column is not None and not 0 < len(row[column]) <= MOST_NAME[what]:
                size = f"a {what} of {len(row[column]):,} characters"
                fault = f"{size}, {MOST_NAME[what]:,} at most" if row[column] else f"no {what}"
                raise DataError(f"{table.path}, line {number}: {fault}")
    return Columns(image, label, split)


def no_labels(table: Table) -> str:
    """What is said of a table without a column of labels."""
    binary = [name for i, name in enumerate(table.header) if {*table.column(i)} <= {*_BINARY}]
    if len(binary) > 1:
        return (
            f"{table.path}, line 1: no column named {', '.join(_LABEL_COLUMNS[:4])}; "
            f"{first_names(binary, _SHOWN)} hold 0 and 1: --task multilabel takes a column for "
            "each class"
        )
    return (
        f"{table.path}, line 1: no column named {', '.join(_LABEL_COLUMNS[:4])}{_choices(table)}; "
        "images without labels are for python -m tools.predict"
    )


def _choices(table: Table) -> str:
    columns = first_names(table.header, _SHOWN)
    return (
        f"; its columns are {columns}: name the right ones with --image-column and --label-column"
    )


def named_column(table: Table, option: str, name: str) -> int | None:
    """The column that an option names; None where it names none. Raises OptionError."""
    if not name or (option == "split_column" and name == "none"):
        return None
    for same in (str, str.lower):
        names = [same(column) for column in table.header]
        if same(name) in names:
            return names.index(same(name))
    hint = did_you_mean(name, table.header, otherwise=f"one of {first_names(table.header, _SHOWN)}")
    raise OptionError(option, f"{table.path} has no column {shown(name)}; {hint}")


def _of_kind(table: Table, usual: Sequence[str], taken: Sequence[int | None]) -> list[int]:
    """The columns with usual names, the likeliest first."""
    names = [_plain(name) for name in table.header]
    found = [names.index(name) for name in usual if name in names]
    return [column for column in found if column not in taken]


def _image_column(table: Table, label: int | None, exists: Callable[[str], bool]) -> int | None:
    for usual in (_PATH_COLUMNS, _ID_COLUMNS):
        found = _of_kind(table, usual, (label,))
        there = [column for column in found if exists(table.rows[0][column])]
        if len(there) == 1 or len(found) == 1:
            return (there or found)[0]
        if found:
            raise DataError(
                f"{table.path}, line 1: more than one column might hold the images"
                + _choices(table)
            )
    return None


def _label_column(
    table: Table, image: int | None, split: int | None, more: Sequence[str]
) -> int | None:
    """The column of labels by its name, which may be one ``more``."""
    found = _of_kind(table, (*more, *_LABEL_COLUMNS), (image, split))
    found = found or _of_kind(table, _OTHER_LABEL_COLUMNS, (image, split))
    if len(found) > 1:
        first = table.column(found[0])
        for other in found[1:]:
            pairs = set(zip(first, table.column(other), strict=True))
            if not len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
                raise DataError(
                    f"{table.path}, line 1: more than one column might hold the labels, "
                    f"{table.header[found[0]]} and {table.header[other]}{_choices(table)}"
                )
    if not found and image is not None:
        rest = [i for i in range(len(table.header)) if i not in (image, split)]
        # Of two columns the other one: Image,Id.
        if len(rest) == 1 and _plain(table.header[rest[0]]) in _ID_COLUMNS:
            return rest[0]
    return found[0] if found else None


# --- parts ----------------------------------------------------------------------------------------


def _flag_of(name: str) -> str | None:
    """The part of a column such as is_train or isTest."""
    plain = _plain(name)
    match = re.fullmatch(r"is(train|val|test)(?:ing|id|idation)?(?:image|set)?", plain)
    return match[1] if match else plain if plain in ("train", "val", "test") else None


def _split_column(table: Table, taken: Sequence[int | None]) -> int | None:
    """The column that says by its name and its values which part an image belongs to.

    Raises DataError for numbers of folds alone, which only the user can sort into parts.
    """
    folds = ""
    for index, name in enumerate(table.header):
        flag, listed = _flag_of(name), _plain(name) in _SPLIT_COLUMNS
        if index in taken or not (flag or listed):
            continue
        values = {value.lower() for value in table.column(index)}
        if flag and values <= {*YES, *NO} or listed and any(_part_of(v) for v in values):
            return index
        if _plain(name) in ("fold", "kfold", "split") and all(v.isdigit() for v in values):
            folds = f"{name} has {len(values)} numbers of folds"
    if folds:
        raise DataError(
            f"{table.path}: the column {folds}: put the rows to validate on in a val.csv and the "
            "others in a train.csv beside it, or add --split-column none to use all rows alike"
        )
    return None


def _part_of(value: str) -> str | None:
    role = split_role(value)
    return role[0] if role and not role[1] else None


def parts_of(table: Table, column: int) -> list[str]:
    """ "train", "val" or "test" for each row. Raises DataError for another value."""
    flag = _flag_of(table.header[column])
    parts = []
    for number, value in zip(table.numbers, table.column(column), strict=True):
        if flag and value.lower() in (*YES, *NO):
            other = "val" if flag == "train" else "train"
            parts.append(flag if value.lower() in YES else other)
            continue
        part = _part_of(value)
        if part is None:
            name = shortened(table.header[column])
            raise DataError(
                f"{table.path}, line {number}: {name} is {shown(value)}, not train, val "
                "or test: correct it, or add --split-column none to use all rows alike"
            )
        parts.append(part)
    return parts
