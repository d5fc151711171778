"""Which images belong together: ``tools.data split --group-by`` and ``--group-pattern``."""

import os
import re
from collections.abc import Sequence

import numpy as np

from config import DataOptions
from errors import OptionError, UserError, printable, shown
from pipeline.sources.csv_files import values_of_column

MOST_PATTERN = 10_000  # characters of --group-pattern; millions take longer than all images
PARENT = "parent"  # --group-by parent: the folder that an image lies in


def groups_of(
    paths: Sequence[str], options: DataOptions, column: str, pattern: str
) -> np.ndarray | None:
    """The number of the group of each image, (N,) int64 from 0; None where nothing is asked for.

    Args:
        paths: of the images.
        options: of the data set that they are from.
        column: of a CSV file; or "parent".
        pattern: a regular expression that is searched in the path; the group is what its first
            parentheses match, or the whole match.

    Raises:
        UserError: for a column or pattern that doesn't give each image a group.
    """
    if column and pattern:
        raise OptionError("group_by", "and --group-pattern both say what a group is: leave one out")
    if pattern:
        names = _by_pattern(paths, pattern)
    elif column == PARENT:
        names = [os.path.dirname(os.path.abspath(path)) for path in paths]
    elif column and options.data_set != "CSV":
        raise OptionError(
            "group_by",
            f"a folder has no columns: give {PARENT}, the folder that an image lies in, or "
            "--group-pattern REGEX for its path",
        )
    elif column:
        values = values_of_column(options, column, "group_by")
        names = [values[path] for path in paths]
    else:
        return None
    return np.unique(names, return_inverse=True)[1]


def _by_pattern(paths: Sequence[str], pattern: str) -> list[str]:
    if len(pattern) > MOST_PATTERN:
        raise OptionError("group_pattern", f"more than {MOST_PATTERN:,} characters: shorten it")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError("group_pattern", f"{shown(pattern)} is no pattern: {error}") from None
    names = []
    for path in paths:
        found = compiled.search(path)
        name = found and (found[1] if compiled.groups else found[0])
        if not name:
            raise UserError(
                f"--group-pattern {pattern!r} finds no group in {printable(path)}: every image "
                "needs one"
            )
        names.append(name)
    return names
