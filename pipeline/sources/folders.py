"""IMNET: one folder per class."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import DataError, OptionError, first_names
from pipeline.decoding import EXTENSIONS
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

logger = logging.getLogger(__name__)


def _subfolders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _scan(root: Path, classes: list[str]) -> FileSource:
    """The image files of ``root/CLASS``, at any depth."""
    paths, targets, ignored = [], [], 0
    for label, name in enumerate(classes):
        for folder, subfolders, files in os.walk(root / name, followlinks=True):
            subfolders[:] = sorted(f for f in subfolders if not f.startswith("."))
            for file in sorted(files):
                if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith("."):
                    paths.append(os.path.relpath(os.path.join(folder, file), root))
                    targets.append(label)
                else:
                    ignored += 1
    if ignored:
        logger.info("%s: %d files that are not images were ignored", root, ignored)
    return FileSource(root, paths, targets, classes)


def _scan_train(root: Path) -> FileSource:
    classes = _subfolders(root)
    if not classes:
        raise DataError(f"{root} has no class folders: one folder per class, its images inside")
    source = _scan(root, classes)
    counts = np.bincount(source.targets, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise DataError(f"{root / name} holds no images: fill or remove the folder")
    return source


def image_folder(is_train: bool, data: "DataOptions", seed: int) -> Source:
    """train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE of which a share is held out."""
    root = data_root(data)
    if root.is_file():
        raise OptionError("data_path", f"{root} is a file: give a folder, or add --data-set CSV")
    layouts = (
        "expected train/CLASS/IMAGE and val/CLASS/IMAGE (or valid, validation, test), "
        "or CLASS/IMAGE with --val-fraction 0.1"
    )
    train = root / "train"
    val = first_existing(root / name for name in VAL_NAMES)
    if not train.is_dir():
        if val is not None or not _subfolders(root):
            raise OptionError("data_path", f"{root} has no train/ folder: {layouts}")
        if data.val_fraction is None:
            raise OptionError("data_path", f"{root} has no train/ and val/ folders: {layouts}")
        train = root
    if val is None:
        if data.val_fraction is None:
            raise OptionError(
                "data_path", f"{root} has no val/ folder: add one, or --val-fraction 0.1"
            )
        return held_out(_scan_train(train), is_train, data.val_fraction, seed)
    refuse_val_fraction(data, str(root))
    if is_train:
        return _scan_train(train)
    return _scan_val(val, _subfolders(train), str(train))


def _scan_val(val: Path, classes: list[str], reference: str) -> FileSource:
    """The images of ``val``; its folders must be among the ``classes`` of ``reference``."""
    for name in _subfolders(val):
        if name not in classes:
            raise DataError(f"{val / name}: no class of that name in {reference}")
    source = _scan(val, classes)
    counts = np.bincount(source.targets, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        logger.warning(
            "%s has no images of %d classes: %s", val, len(missing), first_names(missing)
        )
    return source


def _part_alone(data: "DataOptions") -> Path | None:
    """Where the class folders of a set without a training part are; None for other sets."""
    root = data_root(data)
    if (root / "train").is_dir() or root.is_file():
        return None
    val = first_existing(root / name for name in VAL_NAMES)
    return root if val is None and data.val_fraction is None else val


def folder_validation_part(data: "DataOptions", classes: list[str]) -> Source | None:
    """Class folders of a set without a training part, for a model that knows its classes."""
    part = _part_alone(data)
    return None if part is None else _scan_val(part, classes, "the model")


def folder_classes(data: "DataOptions") -> list[str] | None:
    """The class folders of a set without a training part; None for other sets."""
    part = _part_alone(data)
    return None if part is None else _subfolders(part) or None
