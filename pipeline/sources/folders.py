"""IMNET: one folder per class."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import DataError, OptionError, did_you_mean, first_names, without_surrogates
from pipeline.sources.base import FileSource, Source, data_root, held_out
from pipeline.sources.layout import LAYOUTS, Layout, class_folders, find_layout, split_roles
from pipeline.sources.scan import ClassScan, Listing, listing, suffix

if TYPE_CHECKING:
    from config import DataOptions

logger = logging.getLogger(__name__)


def image_folder(is_train: bool, data: "DataOptions", seed: int) -> Source:
    """train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE of which a share is held out."""
    layout = _layout(data)
    root, train = layout.root, layout.train
    if train is None:
        fix = LAYOUTS
        if layout.val is not None:
            alone = shlex.quote(str(layout.val))
            fix += f"; or a share of one part: --data-path {alone} --val-fraction 0.1"
        raise OptionError("data_path", f"{root} has no train/ folder: {fix}")
    if layout.val is None:
        findings = layout.findings
        if data.val_fraction is None:
            raise OptionError("data_path", _no_validation_part(layout))
        findings += tuple(f"{text}: it isn't used" for text in layout.unusable)
        return held_out(_scan_train(train, data, findings), is_train, data.val_fraction, seed)
    if data.val_fraction is not None:
        raise OptionError(
            "val_fraction",
            f"{root} has its own validation part, {layout.val}: leave it out, or hold out a share "
            f"of the training part alone with --data-path {shlex.quote(str(train))}",
        )
    if is_train:
        return _scan_train(train, data, layout.findings)
    return _scan_val(layout.val, class_folders(train, []).folders, str(train), data)


def _layout(data: "DataOptions") -> Layout:
    """Raises OptionError for what is no folder of class folders."""
    root = data_root(data)
    if root.is_file():
        unpack = root.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz")
        fix = "unpack it and give the folder" if unpack else "give a folder, or add --data-set CSV"
        raise OptionError("data_path", f"{root} is a file: {fix}")
    layout = find_layout(root)
    if layout.undivided:
        found = listing(layout.root)
        if not found.folders:
            raise OptionError(
                "data_path", f"{layout.root} has no class folders{_inside(layout.root, found)}"
            )
    return layout


def _inside(folder: Path, found: Listing) -> str:
    """What a folder without class folders holds, and what can be done with it."""
    if not found.images:
        return f": {LAYOUTS}"
    what = f", but {len(found.images)} images: "
    for place in (folder, folder.parent):
        table = next((name for name in listing(place).files if suffix(name) == ".csv"), None)
        if table:
            path, images = (shlex.quote(str(p)) for p in (place / table, folder))
            return (
                f"{what}with labels in {table}, --data-set CSV --data-path {path} "
                f"--image-root {images} --val-fraction 0.1; else {LAYOUTS}"
            )
    return f"{what}sort them into class folders, or list path,label for --data-set CSV; {LAYOUTS}"


def _no_validation_part(layout: Layout) -> str:
    """What to do about a set without a validation part."""
    if layout.undivided:
        return f"{layout.root} has no train/ and val/ folders: {LAYOUTS}"
    if not layout.unusable:
        return f"{layout.root} has no val/ folder: add one, or --val-fraction 0.1"
    return (
        f"{'; '.join(layout.unusable)}, so it can't be the validation part: add --val-fraction 0.1 "
        f"to hold out a share of {layout.train}, or sort its images into folders named as there"
    )


def _scan(root: Path, classes: list[str], data: "DataOptions") -> tuple[FileSource, ClassScan]:
    found = ClassScan(root, classes, data.on_bad_image)
    source = FileSource(root, found.names, found.targets, classes)
    source.findings = tuple(found.findings)
    if found.not_images:
        kinds = [f"{count} {kind}" for kind, count in found.not_images.items()]
        logger.info(
            "%s: %d files that are not images were ignored (%s)",
            root,
            sum(found.not_images.values()),
            first_names(kinds),
        )
    return source, found


def _scan_train(root: Path, data: "DataOptions", findings: tuple[str, ...]) -> FileSource:
    odd: list[str] = []
    inside = class_folders(root, odd)
    if not inside.folders:
        raise DataError(f"{root} has no class folders{_inside(root, inside)}")
    if inside.images:
        odd.append(
            f"{root}: {len(inside.images)} images lie beside the class folders: not used "
            f"({first_names(inside.images, 2)})"
        )
    source, found = _scan(root, inside.folders, data)
    counts = np.bincount(source.targets, minlength=len(source.classes))
    for name, count in zip(source.classes, counts, strict=True):
        if not count:
            raise DataError(f"{root / name} {found.why_empty(name)}")
    if parts := split_roles(source.classes):
        odd.append(
            f"{root}: {', '.join(parts)} counts as a class, though that is the name of a part"
        )
    source.classes = _class_names(root, inside.folders, odd)
    source.findings = (*findings, *odd, *source.findings)
    return source


def _scan_val(val: Path, classes: list[str], reference: str, data: "DataOptions") -> FileSource:
    """The images of ``val``; its folders must be among the ``classes`` of ``reference``."""
    odd: list[str] = []
    inside = class_folders(val, odd)
    folders = dict(zip(_class_names(val, inside.folders, []), inside.folders, strict=True))
    classes = [folders.get(without_surrogates(name), name) for name in classes]
    for name in inside.folders:
        if name not in classes:
            hint = did_you_mean(name, classes)
            raise DataError(
                f"{val / name}: no class of that name in {reference}" + (hint and f"; {hint}")
            )
    source, _ = _scan(val, classes, data)
    if inside.images:
        odd.append(
            f"{val}: {len(inside.images)} images lie beside the class folders: not used "
            f"({first_names(inside.images, 2)})"
        )
    source.classes = _class_names(val, classes, odd if reference == "the model" else [])
    source.findings = (*odd, *source.findings)
    return source


def _class_names(root: Path, folders: list[str], odd: list[str]) -> list[str]:
    """What the classes of these folders are called; a name that is not UTF-8 is noted in ``odd``.

    Text files, checkpoints and exported models hold valid Unicode only.
    """
    names = [without_surrogates(folder) for folder in folders]
    foreign = [name for name, folder in zip(names, folders, strict=True) if name != folder]
    if len(set(names)) < len(names):
        raise DataError(f"{root}: two class folders are both called {first_names(foreign)}")
    if foreign:
        odd.append(
            f"{root}: names of {len(foreign)} class folders are not UTF-8; the classes are called "
            f"{first_names(foreign)}"
        )
    return names


def _part_alone(data: "DataOptions") -> Path | None:
    """Where the class folders of a set without a training part are; None for other sets."""
    root = data_root(data)
    if root.is_file():
        return None
    layout = find_layout(root)
    if not layout.undivided:
        return None if layout.train is not None else layout.val
    if data.val_fraction is not None:
        return None
    found = listing(layout.root)
    if not found.folders:
        holds = f"{len(found.images)} images and no" if found.images else "no"
        raise OptionError(
            "data_path",
            f"{root} holds {holds} class folders, so there are no labels to compare with: "
            f"if it is a class, give the folder above, {root.parent}; "
            "python -m tools.predict classifies images without labels",
        )
    return layout.root


def folder_validation_part(data: "DataOptions", classes: list[str]) -> Source | None:
    """Class folders of a set without a training part, for a model that knows its classes."""
    part = _part_alone(data)
    return None if part is None else _scan_val(part, classes, "the model", data)


def folder_classes(data: "DataOptions") -> list[str] | None:
    """The class folders of a set without a training part; None for other sets."""
    part = _part_alone(data)
    return None if part is None else _class_names(part, class_folders(part, []).folders, []) or None
