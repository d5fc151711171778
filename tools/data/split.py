"""Split a folder of classes (CLASS/IMAGE) or a CSV file into training, validation and test.

    python -m tools.data split pets --val 0.1 --test 0.1 --output-dir pets-split
    python main.py --data-set CSV --data-path pets-split --model deit_small

Every class is split alike; the same seed gives the same parts. Only lists are written: the images
stay where they are. train.csv and val.csv are what training takes, test.csv is for
main.py --eval --data-set CSV --data-path pets-split/test.csv.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import DataOptions
from errors import OptionError, UserError, printable
from outputs.console import say
from outputs.names import csv_cell, csv_path
from pipeline.dataset import build_dataset, findings
from pipeline.sources.base import stratified_split
from tools.common import command
from utils import written_whole

Row = tuple[str, str]  # path, class name
_COLUMNS = ("image_root", "image_column", "label_column")


def read(source: Path, **columns: str) -> list[Row]:
    """Every image of ``source`` with its class name, sorted.

    ``columns`` are options of a CSV file: ``image_root``, ``image_column``, ``label_column``.
    """
    options = DataOptions(
        data_path=str(source),
        data_set="CSV" if source.is_file() else "IMNET",
        val_fraction=0.5,
        **columns,
    )
    try:
        halves = [build_dataset(part, options, seed=0) for part in (True, False)]
    except OptionError as error:
        if error.option == "val_fraction":
            raise UserError(f"{source} has a validation part already: nothing to split") from None
        if error.option != "data_path":
            raise
        raise UserError(f"{source}: {error.message}") from None
    for text in findings(*halves):
        say(f"warning: {text}")
    return sorted(
        (half.source.sample_id(i), half.classes[label])
        for half in halves
        for i, label in enumerate(half.targets)
    )


def shares(labels: np.ndarray, val: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of each part. A class of one image goes to training, one of two has no validation
    image where there is a test part."""
    rest, parts = np.arange(len(labels)), {}
    if test:
        rest, parts["test"] = stratified_split(labels, test, seed)
    train, held_out = stratified_split(labels[rest], val / (1 - test), seed)
    return {"train": rest[train], "val": rest[held_out], **parts}


def write(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """``NAME.csv`` of ``rows``, whole or not at all. Images below ``folder`` get relative paths,
    so that it can be moved with them. Nothing in it is a formula for a spreadsheet."""
    here = folder.resolve()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label"))
    for path, label in rows:
        absolute = Path(os.path.abspath(path))
        cell = csv_cell(label)
        if cell != cell.strip():
            raise UserError(f"a class's name ends in a space, rename it: {printable(label)!r}")
        place = absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
        writer.writerow((csv_path(str(place)), cell))
    try:
        with written_whole(folder / f"{name}.csv") as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    except UnicodeEncodeError as error:
        name = error.object[max(0, error.start - 60) : error.end + 60].encode("unicode_escape")
        raise UserError(f"a file name is not valid UTF-8, rename it: {name.decode()}") from None


def split(arguments: argparse.Namespace) -> None:
    """Carry out the command."""
    val, test = arguments.val, arguments.test
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise UserError("--val and --test are shares: --val above 0, both together below 1")
    columns = {name: getattr(arguments, name) for name in _COLUMNS}
    rows, folder = read(arguments.source, **columns), arguments.output_dir
    names = np.array([label for _, label in rows])
    parts = shares(np.unique(names, return_inverse=True)[1], val, test, arguments.seed)
    for name in ("train", "val", "test"):
        if (folder / f"{name}.csv").exists():
            raise UserError(f"{folder / name}.csv is there already: choose another --output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, indices in parts.items():
            write(folder, name, [rows[i] for i in indices])
    except OSError as error:
        raise command.not_written(folder, error) from None
    classes = len(set(names))
    for name, indices in parts.items():
        say(f"{folder / name}.csv: {len(indices)} images of {len(set(names[indices]))} classes")
    for name, indices in parts.items():
        if missing := classes - len(set(names[indices])):
            print(f"warning: {name} has no image of {missing} classes, which have too few")
    say(f"next: python main.py --data-set CSV --data-path {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.parser("data split", __doc__)
    arguments.add_argument("source", type=Path, help="folder of class folders, or CSV file")
    arguments.add_argument("--output-dir", type=Path, required=True, help="where the lists go")
    arguments.add_argument("--val", type=float, default=0.1, help="share (default: 0.1)")
    arguments.add_argument("--test", type=float, default=0.0, help="share (default: 0, none)")
    arguments.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    for name in _COLUMNS:
        arguments.add_argument(
            f"--{name.replace('_', '-')}", default="", help="of a CSV file, as in main.py"
        )
    return command.run(split, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
