"""Which folders, files or values of a column stand for training, validation and test."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from errors import OptionError, first_names
from pipeline.sources.scan import Listing, folder_key, holds_images, listing

_ROLES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_FILLERS = ("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "split", "folder")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_JOINED = re.compile(rf"({'|'.join(_ROLES)})({'|'.join(_FILLERS)})")

LAYOUTS = (
    "expected train/CLASS/IMAGE and val/CLASS/IMAGE (or valid, validation, test), "
    "or CLASS/IMAGE with --val-fraction 0.1"
)


def split_role(name: str, fillers: Sequence[str] = ()) -> tuple[str, str] | None:
    """("train", "val" or "test", the rest) for names such as Training, test_set or seg_train.

    The rest is what is left of the name without the words that say nothing (set, images) and
    ``fillers``. None for other names.
    """
    words = []
    for word in _WORD.findall(name):
        joined = _JOINED.fullmatch(word.lower())
        words += joined.groups() if joined else [word.lower()]
    roles = [_ROLES[word] for word in words if word in _ROLES]
    if len(roles) != 1:
        return None
    rest = [w for w in words if w not in _ROLES and w not in _FILLERS and w not in fillers]
    return roles[0], "_".join(rest)


def split_roles(names: Sequence[str], fillers: Sequence[str] = ()) -> dict[str, str]:
    """Those of the names that stand for a part, and which: seg_train beside seg_test, but no
    test_tube beside others."""
    found = {name: role for name in names if (role := split_role(name, fillers))}
    by_rest: dict[str, set[str]] = {}
    for role, rest in found.values():
        by_rest.setdefault(rest, set()).add(role)
    return {
        name: role for name, (role, rest) in found.items() if not rest or len(by_rest[rest]) > 1
    }


def part_named(role: str, roles: dict[str, str], usual: Sequence[str], where: Path) -> str | None:
    """The one name of this role, or the first of the ``usual`` ones where there are several.

    Raises OptionError where none of several is usual.
    """
    names = [name for name, other in roles.items() if other == role]
    if len(names) < 2:
        return names[0] if names else None
    for name in usual:
        if name in names:
            return name
    raise OptionError(
        "data_path",
        f"{where} has several parts for {role}: {', '.join(names)}: name the right one {usual[0]}",
    )


class Layout(NamedTuple):
    """Where the class folders of a data set are."""

    root: Path
    """The folder of the parts or, where it is undivided, of the classes."""
    train: Path | None
    """None: there is no training part."""
    val: Path | None
    """None: there is no validation part that can be used."""
    undivided: bool
    """Whether ``train`` is all there is."""
    unusable: tuple[str, ...]
    """What is wrong with folders that have a validation part's name."""
    findings: tuple[str, ...]
    """What the user should know."""


def find_layout(root: Path) -> Layout:
    """The parts of a data set by the names and the contents of its folders.

    Folders that hold nothing but one other folder are passed through. Raises DataError where a
    folder can't be read, OptionError where several folders might be the training part or the parts
    lie in the class folders.
    """
    findings: list[str] = []
    inner = _passed_through(root, findings)
    found = class_folders(inner, findings)
    roles = split_roles(found.folders)
    if not roles or _are_classes(inner, found, roles):
        _refuse_parts_in_classes(inner, found.folders)
        return Layout(inner, inner, None, True, (), tuple(findings))
    named = part_named("train", roles, ("train",), inner)
    train = _passed_through(inner / named, findings, ()) if named else None
    classes = class_folders(train, []).folders if train else None
    val, unusable = _validation_part(inner, roles, classes, findings)
    unused = [name for name in roles if roles[name] == "train" and name != named]
    if unused:
        findings.append(f"{inner}: {', '.join(unused)} is not used: {named} is the training part")
    if val is not None and train is not None and folder_key(val) == folder_key(train):
        findings.append(f"{val} is the folder {train} itself: training images are validated on")
    return Layout(inner, train, val, False, tuple(unusable), tuple(findings))


def class_folders(root: Path, findings: list[str]) -> Listing:
    """What lies in ``root``, without links to folders above and links that lead nowhere."""
    found = listing(root)
    above = (
        {folder_key(p) for p in (root.resolve(), *root.resolve().parents)} if found.links else ()
    )
    circles = [name for name in found.links if folder_key(root / name) in above]
    if circles:
        findings.append(
            f"{root}: {first_names(circles, 3)} leads back to a folder above: no class, not read"
        )
    if found.broken:
        findings.append(
            f"{root}: {first_names(found.broken, 3)} is a link that leads nowhere: not read"
        )
    return found._replace(folders=[name for name in found.folders if name not in circles])


def _passed_through(
    folder: Path, findings: list[str], classes: Sequence[str] | None = None
) -> Path:
    """``folder``, or the one below it that has more than one folder, or a class or part in it.

    In a part, ``classes`` are the names that are classes; None: ``folder`` may hold parts.
    """
    start = folder
    while True:
        found = class_folders(folder, [])
        if len(found.folders) != 1 or found.images:
            break
        name = found.folders[0]
        if name in classes if classes is not None else split_roles([name]):
            break
        below = class_folders(folder / name, [])
        if not below.folders or below.images:
            break
        folder = folder / name
    if folder != start:
        findings.append(f"{start} holds one folder only: its images are those of {folder}")
    return folder


def _are_classes(root: Path, found: Listing, roles: dict[str, str]) -> bool:
    """Whether folders with the names of parts are classes: train beside bus and car."""
    if "train" in roles.values() and len(set(roles.values())) > 1:
        return False
    others = [name for name in found.folders if name not in roles]
    insides = [listing(root / name) for name in roles]
    return all(inside.images and not inside.folders for inside in insides) and any(
        holds_images(root / name) for name in others
    )


def _refuse_parts_in_classes(root: Path, classes: Sequence[str]) -> None:
    """Raise OptionError for CLASS/train/IMAGE and CLASS/test/IMAGE."""
    for name in classes:
        inside = listing(root / name).folders
        roles = split_roles(inside)
        if len(set(roles.values())) < 2 or len(roles) < len(inside):
            return
    if classes:
        first = next(iter(roles))
        raise OptionError(
            "data_path",
            f"{root} has its parts in the class folders ({name}/{first}): move them to "
            f"{first}/{name}, or list path,label,split in a file for --data-set CSV",
        )


def _validation_part(
    root: Path, roles: dict[str, str], classes: Sequence[str] | None, findings: list[str]
) -> tuple[Path | None, list[str]]:
    """The folder of the validation part that can be used, and what is wrong with those before."""
    unusable = []
    for role, usual in (("val", ("val", "valid", "validation")), ("test", ("test",))):
        name = part_named(role, roles, usual, root)
        if name is None:
            continue
        passed: list[str] = []
        folder = _passed_through(root / name, passed, classes or ())
        problem = _why_unusable(folder, classes)
        if problem is None:
            findings += passed + [f"{text}: {folder} is the validation part" for text in unusable]
            return folder, []
        unusable.append(problem)
    return None, unusable


def _why_unusable(folder: Path, classes: Sequence[str] | None) -> str | None:
    found = class_folders(folder, [])
    if found.folders and not holds_images(folder):
        return f"{folder} holds no images"
    if len(found.folders) == 1 and classes is not None and found.folders[0] not in classes:
        folder = folder / found.folders[0]
        found = listing(folder)
    if found.folders:
        return None
    if not found.images:
        return f"{folder} {'holds no images' if found.files else 'is empty'}"
    return f"{folder} holds {len(found.images)} images and no class folders"
