"""Split a folder of classes (CLASS/IMAGE) or a CSV file into training, validation and test.

    python -m tools.data split pets --val 0.1 --test 0.1 --output-dir pets-split
    python main.py --data-set CSV --data-path pets-split --model deit_small

Every class is split alike; the same seed gives the same parts. Only lists are written: the images
stay where they are. train.csv and val.csv are what training takes, test.csv is for
main.py --eval --data-set CSV --data-path pets-split/test.csv.

    python -m tools.data split scans.csv --group-by patient --folds 5 --output-dir scans-folds

--group-by keeps the images of a patient, an animal or a place together: never on both sides.
--folds writes K pairs of lists, fold-1/ to fold-K/, each a data set of its own; every image is
validated in one of them.

    python -m tools.data split tags.csv --task multilabel --output-dir tags-split

deals out images with any number of labels, so that each label has its share in every part; with
--folds and --group-by too.
"""

import argparse
import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpointing.files import CLASSIFICATION, MULTILABEL
from config import DataOptions
from errors import OptionError, UserError, printable
from outputs.console import say
from outputs.names import csv_cell, csv_path
from pipeline.dataset import ImageDataset, build_dataset, findings
from pipeline.sources.base import stratified_split
from pipeline.sources.stratified import iterative_split
from tools.common import command
from tools.data.folds import classes_of, deal_groups, deal_images, keep_classes
from tools.data.groups import PARENT, groups_of
from utils import written_whole

Row = tuple[str, str]  # path, class name
_COLUMNS = ("image_root", "image_column", "label_column", "split_column")


def read(source: Path, **columns: str) -> tuple[list[Row], DataOptions]:
    """Every image of ``source`` with its class name, sorted; and how it was read.

    ``columns`` are options of a CSV file: ``image_root``, ``image_column``, ``label_column`` and
    ``split_column``.
    """
    data_set = "CSV" if source.is_file() else "IMNET"
    train = _both_halves(source, data_set=data_set, **columns)
    images = train.source.source  # both halves
    rows = [(images.sample_id(i), images.classes[label]) for i, label in enumerate(images.targets)]
    return sorted(rows), DataOptions(data_path=str(source), data_set=data_set, **columns)


def _both_halves(source: Path, **options: Any) -> ImageDataset:
    """The training half of all images, whose source's source has both; says what is found."""
    data = DataOptions(data_path=str(source), val_fraction=0.5, **options)
    try:
        train = build_dataset(True, data, seed=0)
    except OptionError as error:
        if error.option == "val_fraction":
            raise UserError(f"{source} has a validation part already: nothing to split") from None
        if error.option != "data_path":
            raise
        raise UserError(f"{source}: {error.message}") from None
    for text in findings(train):
        say(f"warning: {text}")
    return train


def parts_of(
    labels: np.ndarray, groups: np.ndarray | None, val: float, test: float, seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Indices of each part, and how many images went over to training for their classes.

    A class of one image goes to training, one of two has no validation image where there is a test
    part. So do classes of one group, and of two.
    """
    rest, parts = np.arange(len(labels)), {}
    if groups is None:
        split_off = stratified_split if labels.ndim == 1 else iterative_split
        if test:
            rest, parts["test"] = split_off(labels, test, seed)
        train, held_out = split_off(labels[rest], val / (1 - test), seed)
        return {"train": rest[train], "val": rest[held_out], **parts}, 0
    names = ("train", "val", "test") if test else ("train", "val")
    part = deal_groups(groups, labels, (1 - val - test, val, test)[: len(names)], seed)
    held_out, moved = keep_classes(part > 0, groups, labels)
    part[~held_out] = 0
    return {name: np.flatnonzero(part == i) for i, name in enumerate(names)}, moved


def folds_of(
    labels: np.ndarray, groups: np.ndarray | None, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Indices for training and for validation of each fold, and how many images of the fold are
    trained on in it for their classes."""
    if groups is None:
        fold = deal_images(labels, folds, seed)
        groups = np.arange(len(labels))
    else:
        fold = deal_groups(groups, labels, [1 / folds] * folds, seed)
    found = []
    for number in range(folds):
        held_out, moved = keep_classes(fold == number, groups, labels)
        found.append((np.flatnonzero(~held_out), np.flatnonzero(held_out), moved))
    return found


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
    val, test, folds = arguments.val, arguments.test, arguments.folds
    for option in ("label_columns", "label_separator"):
        if getattr(arguments, option) and arguments.task != MULTILABEL:
            raise OptionError(option, f"is for several labels per image: add --task {MULTILABEL}")
    if folds and val is not None:
        raise UserError("--val is a share of one split: with --folds leave it out")
    val = 1 / folds if folds else 0.1 if val is None else val
    if not (0 < val < 1 and 0 <= test < 1 and (folds or val + test < 1)):
        raise UserError("--val and --test are shares: --val above 0, both together below 1")
    listed = _listed(arguments)
    paths = [path for path, _ in listed.rows]
    groups = groups_of(paths, listed.options, arguments.group_by, arguments.group_pattern)
    needed = folds + bool(test) if folds else 2 + bool(test)
    _refuse_few(needed, listed.labels, groups)
    if folds:
        _write_folds(arguments, listed, groups)
        return
    parts, moved = parts_of(listed.labels, groups, val, test, arguments.seed)
    _refuse_existing(arguments.output_dir, parts)
    _write_lists(arguments.output_dir, listed, parts)
    _say_moved(moved, f"training, as the only ones of a {listed.what[0]} there")
    place = shlex.quote(str(arguments.output_dir))
    say(f"next: python main.py {listed.words}--data-set CSV --data-path {place}")


@dataclass(frozen=True)
class Listed:
    """All images of a set, and how they were read."""

    rows: list[Row]
    labels: np.ndarray
    """(N,) integers from 0; of several labels per image (N, K) of 0 and 1."""
    options: DataOptions
    classes: int
    """How many there are."""

    @property
    def what(self) -> tuple[str, str]:
        """What one, and several of those, are called."""
        return ("class", "classes") if self.labels.ndim == 1 else ("label", "labels")

    @property
    def words(self) -> str:
        """What training needs to be told, with a space behind it."""
        return "" if self.labels.ndim == 1 else f"--task {MULTILABEL} "


def _listed(arguments: argparse.Namespace) -> Listed:
    columns = {name: getattr(arguments, name) for name in _COLUMNS}
    if arguments.task != MULTILABEL:
        rows, options = read(arguments.source, **columns)
        names, labels = np.unique([name for _, name in rows], return_inverse=True)
        return Listed(rows, labels, options, len(names))
    source = arguments.source
    if not source.is_file():
        raise UserError(f"{source}: the labels are in no folder: name a CSV file")
    columns |= {name: getattr(arguments, name) for name in ("label_columns", "label_separator")}
    columns |= {"task": MULTILABEL, "data_set": "CSV"}
    images = _both_halves(source, **columns).source.source
    names = [[images.classes[k] for k in np.flatnonzero(target)] for target in images.targets]
    rows = [(images.sample_id(i), json.dumps(each)) for i, each in enumerate(names)]
    options = DataOptions(data_path=str(source), **columns)
    return Listed(rows, images.targets, options, len(images.classes))


def _refuse_few(needed: int, labels: np.ndarray, groups: np.ndarray | None) -> None:
    count, what = len(labels), "images"
    if groups is not None:
        count, what = int(groups.max()) + 1, "groups"
    if count < needed:
        raise UserError(f"{count} {what} are too few for {needed} parts: ask for fewer")


def _write_folds(arguments: argparse.Namespace, listed: Listed, groups: np.ndarray | None) -> None:
    folds, folder, labels = arguments.folds, arguments.output_dir, listed.labels
    rest = np.arange(len(labels))
    test: dict[str, np.ndarray] = {}
    if arguments.test:
        shares = parts_of(labels, groups, arguments.test, 0.0, arguments.seed)
        rest, test = shares[0]["train"], {"test": shares[0]["val"]}
    inside = None if groups is None else np.unique(groups[rest], return_inverse=True)[1]
    _refuse_few(folds, labels[rest], inside)
    found = folds_of(labels[rest], inside, folds, arguments.seed)
    if not all(len(val) for _, val, _ in found):
        raise UserError("a fold has no image to validate on: ask for fewer --folds")
    names = [f"fold-{number}" for number in range(1, folds + 1)]
    _refuse_existing(folder, test)
    for name in names:
        _refuse_existing(folder / name, ("train", "val"))
    if test:
        _write_lists(folder, listed, test)
    for name, (train, val, moved) in zip(names, found, strict=True):
        _write_lists(folder / name, listed, {"train": rest[train], "val": rest[val]})
        _say_moved(moved, f"training in {name} too, as the only ones of a {listed.what[0]}")
    place, runs = (shlex.quote(str(path)) for path in (folder, f"{folder}-runs"))
    say(
        f"next: for k in $(seq {folds}); do python main.py {listed.words}--data-set CSV "
        f"--data-path {place}/fold-$k --output-dir {runs}/fold-$k; done"
    )
    say(f"then: python -m tools.summary {runs}/fold-*")


def _say_moved(count: int, where: str) -> None:
    if count:
        say(f"warning: {count} images are in {where}")


def _refuse_existing(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / f"{name}.csv").exists():
            raise UserError(f"{folder / name}.csv is there already: choose another --output-dir")


def _write_lists(folder: Path, listed: Listed, parts: Mapping[str, np.ndarray]) -> None:
    """Write the list of each part, and say what it has and lacks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, indices in parts.items():
            write(folder, name, [listed.rows[i] for i in indices])
    except OSError as error:
        raise command.not_written(folder, error) from None
    for name, indices in parts.items():
        there, what = len(classes_of(listed.labels[indices])), listed.what[1]
        say(f"{folder / name}.csv: {len(indices)} images of {there} {what}")
        if lacks := listed.classes - there:
            say(f"warning: {name} has no image of {lacks} {what}, which have too few")


def _folds(text: str) -> int:
    number = command.positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError("two folds are the least")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.parser("data split", __doc__)
    arguments.add_argument("source", type=Path, help="folder of class folders, or CSV file")
    arguments.add_argument("--output-dir", type=Path, required=True, help="where the lists go")
    arguments.add_argument("--val", type=float, help="share (default: 0.1)")
    arguments.add_argument("--test", type=float, default=0.0, help="share (default: 0, none)")
    arguments.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    arguments.add_argument(
        "--folds", type=_folds, default=0, help="so many pairs of lists for cross-validation"
    )
    arguments.add_argument(
        "--group-by",
        default="",
        metavar="COLUMN",
        help=f"images of one value stay together: a column of the CSV file, or {PARENT}, the "
        "folder that an image lies in",
    )
    arguments.add_argument(
        "--group-pattern",
        default="",
        metavar="REGEX",
        help="the group is what this finds in an image's path, or its first parentheses",
    )
    arguments.add_argument(
        "--task",
        choices=(CLASSIFICATION, MULTILABEL),
        default=CLASSIFICATION,
        help="multilabel: a CSV file with any number of labels per image",
    )
    arguments.add_argument(
        "--label-columns", nargs="+", default=(), help="multilabel, as in main.py"
    )
    arguments.add_argument("--label-separator", default="", help="multilabel, as in main.py")
    for name in _COLUMNS:
        arguments.add_argument(
            f"--{name.replace('_', '-')}", default="", help="of a CSV file, as in main.py"
        )
    return command.run(split, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
