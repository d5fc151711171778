"""Finding image files below folders, and what is odd about what lies there."""

import os
import re
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import DataError, first_names, os_error_text
from pipeline.formats import EXTENSIONS, UNREADABLE, is_image, package_for
from pipeline.sources.names import NamesByFolder

# Folders that other programs leave behind.
_LEFT_BEHIND = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
# What segmentation data call the mask of an image: 001_mask.png beside 001.png, or a folder.
_MASK = re.compile(r"(.+?)[ _-](?:mask|segmentation)s?(?:[ _-]?\d+)?")
_MASK_FOLDERS = frozenset(("mask", "masks", "segmentation", "segmentations"))
_AFTER_DOT = chr(ord(".") + 1)
_LOOKED_INTO = 10  # unknown extensions of which a file is looked into


def suffix(name: str) -> str:
    """The extension of a file in lower case, with its dot; "" for none."""
    return os.path.splitext(name)[1].lower()


class Listing(NamedTuple):
    """What lies in a folder, sorted; hidden names and what other programs leave are left out."""

    folders: list[str]
    files: list[str]
    broken: list[str]
    """Links that lead nowhere, or in a circle."""
    links: list[str]
    """Those of the folders that are links."""

    @property
    def images(self) -> list[str]:
        # As ``suffix`` finds it in names that don't begin with a dot.
        return [name for name in self.files if name[name.rfind(".") :].lower() in EXTENSIONS]


def listing(folder: Path | str) -> Listing:
    """Raises DataError where the folder can't be read."""
    folders: list[str] = []
    files: list[str] = []
    broken: list[str] = []
    links: list[str] = []
    others: list[os.DirEntry] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # Plain files are nearly all there is: for each of them one question.
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                else:
                    others.append(entry)
        for entry in others:
            if _is_folder(entry):
                folders.append(entry.name)
                links += [entry.name] if entry.is_symlink() else []
            elif entry.is_symlink() and _leads_nowhere(entry):
                broken.append(entry.name)
            else:
                files.append(entry.name)
    except OSError as error:
        raise DataError(os_error_text(error, folder)) from None
    return Listing(*(_shown_and_sorted(names) for names in (folders, files, broken, links)))


def _shown_and_sorted(names: list[str]) -> list[str]:
    names.sort()
    # Those that begin with a dot lie together.
    del names[bisect_left(names, ".") : bisect_left(names, _AFTER_DOT)]
    left = _LEFT_BEHIND.intersection(names)
    return [name for name in names if name not in left] if left else names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:
        raise
    except OSError:  # a link in a circle
        return False


def _leads_nowhere(entry: os.DirEntry) -> bool:
    # An image that is missing is named when it is read.
    return suffix(entry.name) not in EXTENSIONS and not os.path.exists(entry.path)


def holds_images(folder: Path | str) -> bool:
    """Whether there is an image in the folder or below. Raises DataError."""
    return next(image_files(folder), None) is not None


def image_files(folder: Path | str) -> Iterator[str]:
    """The image files in a folder and below, each real folder once. Raises DataError."""
    for found, images in images_by_folder(folder):
        yield from (os.path.join(folder, found, name) for name in images)


def images_by_folder(folder: Path | str) -> Iterator[tuple[str, list[str]]]:
    """Each real folder from ``folder`` on, as a path from there, and its image files. Raises
    DataError."""
    for found, _, names in _Walk(str(folder)).folders(""):
        yield found, names.images


class _Walk:
    """The folders below ``root``; a real folder comes once, however many links lead to it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.repeated: list[str] = []
        real = Path(os.path.realpath(root))
        self.above = {folder_key(path) for path in (real, *real.parents)}

    def folders(self, start: str) -> Iterator[tuple[str, tuple[int, int], Listing]]:
        """``start`` and the folders below: path from the root, key, what lies there."""
        seen: set[tuple[int, int]] = set()
        waiting = [start]
        while waiting:
            relative = waiting.pop()
            path = os.path.join(self.root, relative)
            key = folder_key(path)
            if key in seen or (relative and key in self.above):
                self.repeated.append(relative)
                continue
            seen.add(key)
            found = listing(path)
            yield relative, key, found
            waiting += [os.path.join(relative, name) for name in reversed(found.folders)]


def folder_key(folder: Path | str) -> tuple[int, int]:
    """Equal for two paths of one folder. Raises DataError."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(os_error_text(error, folder)) from None
    return status.st_dev, status.st_ino


class _Read(dict[str, bool]):
    """Whether files with an extension, as it is spelled, are read as images here."""

    def __init__(self) -> None:
        self._kinds = {kind for kind in EXTENSIONS if not package_for(kind)}

    def __missing__(self, spelled: str) -> bool:
        read = spelled.lower() in self._kinds
        if read:  # of others there may be as many as files
            self[spelled] = True
        return read


class ClassScan:
    """The image files of ``root/CLASS``, at any depth, in the order of the sorted names.

    Attributes:
        classes: names of the class folders.
        names: the path of each image from the root.
        targets: the number of its class, (N,) int64.
        findings: what the user should know, a sentence each.

    Raises:
        DataError: a folder can't be read, or images need a package that isn't installed and
            ``on_bad_image`` isn't "skip".
    """

    def __init__(self, root: Path, classes: Iterable[str], on_bad_image: str = "error") -> None:
        self.root = root
        self.classes = list(classes)
        self.findings: list[str] = []
        self._others: dict[str, list[str]] = {}  # extension -> files that aren't read
        self._broken: list[str] = []
        self._owners: dict[tuple[int, int], str] = {}  # real folder -> its path
        self._shared: list[str] = []
        self._below: dict[str, list[str]] = {}  # class -> its subfolders that hold images
        self._own: dict[str, int] = {}  # class -> images in its folder itself
        self._masks: list[str] = []
        self._read = _Read()
        walk = _Walk(str(root))
        found = NamesByFolder()
        counts = [self._scan(walk, name, found) for name in self.classes]
        self.names = found.names()
        self.targets = np.repeat(np.arange(len(counts)), counts)
        self._find(walk, on_bad_image)

    def _scan(self, walk: _Walk, name: str, names: NamesByFolder) -> int:
        """Add the images of a class to ``names``; returns how many they are."""
        if not os.path.lexists(os.path.join(walk.root, name)):
            return 0  # a class that this part lacks
        count, read = 0, self._read
        for relative, key, found in walk.folders(name):
            owner = self._owners.setdefault(key, relative)
            if owner != relative:
                self._shared.append(f"{owner} and {relative}")
            self._broken += [os.path.join(relative, link) for link in found.broken]
            images = [file for file in found.files if read[file[file.rfind(".") :]]]
            if len(images) < len(found.files):
                for file in sorted(set(found.files).difference(images)):
                    path = os.path.join(relative, file)
                    self._others.setdefault(suffix(file), []).append(path)
            names.add(relative, images)
            self._masks += _masks(relative, images)
            count += len(images)
            if relative == name:
                self._own[name] = len(images)
            elif images:
                self._below.setdefault(name, []).append(relative[len(name) + 1 :])
        return count

    def why_empty(self, name: str) -> str:
        """What is to be done about a class folder without images."""
        inside = [k for k, paths in self._others.items() if any(_lies_in(p, name) for p in paths)]
        kinds = [kind or "without extension" for kind in inside]
        only = f", only files {first_names(kinds)}" if kinds else ""
        fix = "convert them to PNG or JPEG" if UNREADABLE & set(inside) else "fill it"
        deeper = [name for name, below in self._below.items() if below and not self._own[name]]
        other = ""
        if len(deeper) == 1:
            path = shlex.quote(str(self.root / deeper[0]))
            other = f"; if the classes lie in {deeper[0]}, give --data-path {path}"
        return f"holds no images{only}: {fix}, or remove the folder{other}"

    def _find(self, walk: _Walk, on_bad_image: str) -> None:
        root, found = self.root, self.findings
        self._find_unread(on_bad_image)
        if walk.repeated:
            found.append(
                f"{root}: {_links(len(walk.repeated))} to a folder above, or to one that is "
                f"counted already: not followed ({first_names(walk.repeated, 3)})"
            )
        if self._broken:
            found.append(
                f"{root}: {_links(len(self._broken))} nowhere: nothing is read there "
                f"({first_names(self._broken, 3)})"
            )
        if self._shared:
            found.append(
                f"{root}: the same folder lies under two names, its images count twice "
                f"({first_names(self._shared, 3)})"
            )
        if self._masks and len(self._masks) < len(self.targets):
            found.append(
                f"{root}: {len(self._masks)} files are named as masks of other images "
                f"({first_names(self._masks, 2)}) and count as images of their class: if they are "
                "masks, move them elsewhere"
            )
        self._find_deeper_classes()

    def _find_unread(self, on_bad_image: str) -> None:
        unknown = []
        for kind, paths in sorted(self._others.items()):
            what = f"{self.root}: {len(paths)} {kind[1:].upper()} images ({first_names(paths, 2)})"
            package = package_for(kind)
            if package and on_bad_image != "skip":
                raise DataError(
                    f"{what} need a package: pip install {package} (or convert them to JPEG, or "
                    "leave them out with --on-bad-image skip)"
                )
            if package:
                self.findings.append(f"{what} are left out: pip install {package} reads them")
            elif kind in UNREADABLE:
                self.findings.append(
                    f"{what} are left out, this format isn't read: convert them to PNG or JPEG"
                )
            else:
                unknown.append((kind, paths))
        for kind, paths in sorted(unknown, key=lambda item: -len(item[1]))[:_LOOKED_INTO]:
            if is_image(self.root / paths[0]):
                self.findings.append(
                    f"{self.root}: {len(paths)} files {kind or 'without extension'} are left out "
                    f"though they are images ({first_names(paths, 2)}): rename them to .jpg, .png …"
                )

    @property
    def not_images(self) -> dict[str, int]:
        """Files that aren't images, by extension, the most frequent first."""
        counts = Counter({kind or "without extension": len(p) for kind, p in self._others.items()})
        return dict(counts.most_common())

    def _find_deeper_classes(self) -> None:
        """Classes that hold no images themselves, but folders of images that differ."""
        below = {
            name: {p.split(os.sep)[0] for p in self._below.get(name, ())} for name in self._own
        }
        several = [name for name, folders in below.items() if len(folders) > 1]
        if several and not any(self._own.values()):
            name, folders = several[0], below[several[0]]
            self.findings.append(
                f"{self.root}: the classes are {first_names(self.classes, 3)}, whose folders hold "
                f"no images but folders of images ({name}: {first_names(sorted(folders), 3)}); if "
                f"those are the classes, give --data-path {shlex.quote(str(self.root / name))}, or "
                "a list with --data-set CSV"
            )


def _lies_in(path: str, folder: str) -> bool:
    return path.startswith(folder + os.sep)


def _masks(folder: str, images: list[str]) -> list[str]:
    """The paths of those images in a folder that are named as masks of others."""
    if os.path.basename(folder).lower() in _MASK_FOLDERS and os.sep in folder:
        return [os.path.join(folder, name) for name in images]
    text = "\n".join(images).lower()  # of millions of names hardly any is looked at by itself
    if "mask" not in text and "segmentation" not in text:
        return []
    stems = {os.path.splitext(name)[0].lower() for name in images}
    matches = ((name, _MASK.fullmatch(os.path.splitext(name)[0].lower())) for name in images)
    return [os.path.join(folder, name) for name, match in matches if match and match[1] in stems]


def _links(count: int) -> str:
    return f"{count} link leads" if count == 1 else f"{count} links lead"
