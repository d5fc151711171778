"""A file system that refuses one operation of a process, in forked processes that are told so."""

import builtins
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Functions of ``os`` that change what is on the disk, by what they take first.
_BY_PATH = (
    "truncate",
    "replace",
    "rename",
    "link",
    "symlink",
    "unlink",
    "remove",
    "rmdir",
    "mkdir",
)
_BY_PATH += ("utime",)
_BY_FILE = ("write", "fsync", "ftruncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_real_open, _real_os_open = builtins.open, os.open


@dataclass
class Refusal:
    """Notes the operations on the files of a folder, or refuses one of them, once.

    Attributes:
        folder: whose files count.
        notes: a file that gets a line for each operation, or None.
        refused: the line of the operation that is to fail, or "".
        number: of the error.
    """

    folder: Path
    notes: Path | None = None
    refused: str = ""
    number: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def check(self, operation: str, what: Any) -> None:
        """Raise OSError if this operation is to fail. ``what`` is a path or a descriptor."""
        try:
            path = (
                os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
            )
        except OSError:
            return
        path = os.path.abspath(os.fsdecode(path)).removesuffix(" (deleted)")
        if not path.startswith(str(self.folder)):
            return
        # The names of event files hold time, process and host; those of trackers, time and run;
        # that of a folder for a trace, random letters.
        name = re.sub(r"tfevents\..*", "tfevents", os.path.relpath(path, self.folder))
        name = re.sub(r"(offline-run|run|tmp)[-_]?\w+(-\w+)?", r"\1", name)
        rank = os.environ.get("RANK", "0")
        kind = f"{operation} {name} {rank}"
        self.seen[kind] += 1
        line = f"{kind} {self.seen[kind]}"
        if self.notes is not None:
            handle = _real_os_open(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            _os_write(handle, f"{line}\n".encode())
            os.close(handle)
        if line == self.refused:
            raise OSError(self.number, os.strerror(self.number), path)


_os_write = os.write


def install(refusal: Refusal) -> None:
    """Put ``refusal`` in front of all writing of this process, for good."""

    class Raw(io.FileIO):
        def write(self, data: Any) -> int | None:
            refusal.check("write", self.fileno())
            return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            refusal.check("truncate", self.fileno())
            return super().truncate(size)

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Callable[..., int] | None = None,
    ) -> Any:
        if not set(mode) & set("wax+"):
            return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            refusal.check("open", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        text = io.TextIOWrapper(buffer, encoding, errors, newline)
        text.mode = mode
        return text

    def opened_low(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITING:
            refusal.check("open", path)
        return _real_os_open(path, flags, *args, **kwargs)

    def checked(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(what: Any, *args: Any, **kwargs: Any) -> Any:
            # Of a link or a new name it is the second path that is written.
            target = args[0] if name in ("replace", "rename", "link", "symlink") else what
            if kwargs.get("dir_fd") is not None:
                target = os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), what)
            refusal.check(name, target)
            return real(what, *args, **kwargs)

        return call

    builtins.open = io.open = opened
    os.open = opened_low
    for name in (*_BY_PATH, *_BY_FILE):
        setattr(os, name, checked(name))
    sys.dont_write_bytecode = True
