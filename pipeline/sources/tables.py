"""CSV tables of images: their rows, and which column holds what."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from errors import DataError, OptionError, did_you_mean, os_error_text
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
_SPLIT_COLUMNS = ("split", "set", "subset", "fold", "dataset", "datasplit", "partition", "part")
_SPLIT_COLUMNS += ("datatype", "phase", "mode", "usage", "traintest", "traintestsplit", "kfold")
_YES, _NO = ("1", "true", "yes", "y", "t", "1.0"), ("0", "false", "no", "n", "f", "0.0")


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

    Raises DataError, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(os_error_text(error, path)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} can't be read: {error}; save it as UTF-8") from None
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
    first = rows[0][1]
    known = (*_PATH_COLUMNS, *_ID_COLUMNS, *_LABEL_COLUMNS, *_OTHER_LABEL_COLUMNS)
    has_header = any(_plain(name) in known for name in first) and not exists(first[0])
    if not has_header and len(first) == 2 and exists(first[0]):
        header = None
    else:
        header, rows = first, rows[1:]
    for number, row in rows:
        if len(row) != len(first):
            raise DataError(f"{path}, line {number}: {len(row)} columns instead of {len(first)}")
    if not rows:
        raise DataError(f"{path} has no images")
    return Table(path, delimiter, header, [row for _, row in rows], [n for n, _ in rows])


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
    image, label, split = (_named(table, name, getattr(data, name)) for name in options)
    if split is None and not data.split_column:
        split = _split_column(table, taken=(image, label))
    if image is None:
        image = _image_column(table, label, exists)
    if label is None:
        label = _label_column(table, image, split)
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
            if column is not None and not row[column]:
                raise DataError(f"{table.path}, line {number}: no {what}")
    return Columns(image, label, split)


def no_labels(table: Table) -> str:
    """What is said of a table without a column of labels."""
    return (
        f"{table.path}, line 1: no column named {', '.join(_LABEL_COLUMNS[:4])}{_choices(table)}; "
        "images without labels are for python -m tools.predict"
    )


def _choices(table: Table) -> str:
    return (
        f"; its columns are {', '.join(table.header)}: name the right ones with --image-column and "
        "--label-column"
    )


def _named(table: Table, option: str, name: str) -> int | None:
    """The column that an option names."""
    if not name or (option == "split_column" and name == "none"):
        return None
    for same in (str, str.lower):
        names = [same(column) for column in table.header]
        if same(name) in names:
            return names.index(same(name))
    hint = did_you_mean(name, table.header, otherwise=f"one of {', '.join(table.header)}")
    raise OptionError(option, f"{table.path} has no column {name!r}; {hint}")


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


def _label_column(table: Table, image: int | None, split: int | None) -> int | None:
    found = _of_kind(table, _LABEL_COLUMNS, (image, split))
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
        if flag and values <= {*_YES, *_NO} or listed and any(_part_of(v) for v in values):
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
        if flag and value.lower() in (*_YES, *_NO):
            other = "val" if flag == "train" else "train"
            parts.append(flag if value.lower() in _YES else other)
            continue
        part = _part_of(value)
        if part is None:
            raise DataError(
                f"{table.path}, line {number}: {table.header[column]} is {value!r}, not train, val "
                "or test: correct it, or add --split-column none to use all rows alike"
            )
        parts.append(part)
    return parts
