"""Names of files, folders and classes, as tables and charts can hold them. They may be anything."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator

from errors import printable, shortened

# By these a spreadsheet tells a formula, in their wide forms too.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def csv_cell(text: str) -> str:
    """``text`` for a cell that a spreadsheet may open: what would be a formula gets an apostrophe
    in front. :func:`from_csv_cell` is the inverse."""
    return f"'{text}" if _is_formula(text) else text


def from_csv_cell(cell: str) -> str:
    """The text of a cell that :func:`csv_cell` made."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def csv_path(path: str) -> str:
    """A path for a cell, as :func:`csv_cell`, that leads to the same file."""
    return os.path.join(".", path) if _is_formula(path) else path


def _is_formula(text: str) -> bool:
    # Apostrophes in front don't count, so that every text comes back as it was.
    text = text.lstrip("'")
    return text.startswith(_FORMULA) and not _NUMBER.fullmatch(text)


def chart_label(text: str, most: int = 40) -> str:
    """``text`` for matplotlib, at most ``most`` characters, in which nothing is a formula."""
    return shortened(printable(text), most).replace("$", r"\$")


@contextlib.contextmanager
def any_glyphs() -> Iterator[None]:
    """Inside, matplotlib draws boxes for characters that its fonts lack, and says nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield
