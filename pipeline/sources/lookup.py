"""Finding the files that a list names: below a folder, with or without their extension."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from errors import DataError, os_error_text
from pipeline.formats import EXTENSIONS
from pipeline.sources.scan import images_by_folder, listing, suffix

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
_MOST_FOLDERS = 200  # that are looked into for files that are missing


class ImageFiles:
    """The image files below ``root`` by name; each folder is read once, when it is asked for.

    With ``anywhere`` a name without a folder is also looked for in the folders below.
    """

    def __init__(self, root: Path, *, anywhere: bool = False) -> None:
        self.root = root
        self._anywhere = anywhere
        self._files: dict[str, set[str]] = {}
        self._by_stem: dict[str, dict[str, list[str]]] = {}
        self._below: dict[str, list[str]] | None = None  # by their names without extension

    def find(self, name: str) -> list[str]:
        """The paths from the root that ``name`` may mean, best one; [] where there is none.

        A backslash may separate folders. Raises DataError where a folder can't be read.
        """
        spelled = [name, name.replace("\\", "/")] if "\\" in name else [name]
        for path in spelled:
            if found := self._in_its_folder(path):
                return found
        if self._anywhere and not os.path.dirname(spelled[-1]):
            return self._in_folders_below(spelled[-1])
        return []

    def _in_its_folder(self, path: str) -> list[str]:
        folder, base = os.path.split(path)
        if folder not in self._files:
            self._files[folder] = self._read(folder)
        if base in self._files[folder]:
            return [path]
        if suffix(base) in EXTENSIONS:
            return []
        if folder not in self._by_stem:
            self._by_stem[folder] = by_stem(self._files[folder])
        return [os.path.join(folder, file) for file in self._by_stem[folder].get(base, ())]

    def _read(self, folder: str) -> set[str]:
        path = os.path.join(self.root, folder)
        try:
            with os.scandir(path) as entries:
                return {entry.name for entry in entries}
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno in _NOTHING_THERE:
                return set()
            raise DataError(os_error_text(error, path)) from None

    def _in_folders_below(self, name: str) -> list[str]:
        if self._below is None:
            self._below = {}
            for folder, files in images_by_folder(self.root):
                for file in files:
                    place = os.path.join(folder, file) if folder else file
                    self._below.setdefault(os.path.splitext(file)[0], []).append(place)
        whole = self._below.get(os.path.splitext(name)[0], ())
        found = [place for place in whole if os.path.basename(place) == name]
        return found + self._below.get(name, [])


def by_stem(files: Sequence[str] | set[str]) -> dict[str, list[str]]:
    """The image files by their names without the extension."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        if suffix(file) in EXTENSIONS:
            found.setdefault(os.path.splitext(file)[0], []).append(file)
    return found


def where_it_lies(name: str, around: Path) -> Path | None:
    """A folder near ``around`` from which ``name`` leads to a file; None where none was found."""
    candidates, place = [around], 0
    while place < len(candidates) and len(candidates) < _MOST_FOLDERS:
        folder = candidates[place]
        place += 1
        try:
            candidates += [folder / inner for inner in listing(folder).folders]
        except DataError:
            continue
    for folder in (*candidates[:_MOST_FOLDERS], around.resolve().parent):
        try:
            if ImageFiles(folder).find(name):
                return folder
        except DataError:
            continue
    return None
