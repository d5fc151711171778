"""Reading files that somebody else wrote: regular ones only, and no more bytes than are stated.

A named pipe would be waited for, a device has no end, and a sparse file of gigabytes is made in a
moment.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_HANDED = re.compile(r"/(dev|proc/self)/(stdin|fd/\d+)")
# A pipe that nobody writes to would hold whoever opens it. Windows translates line ends in text.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def size_text(count: int) -> str:
    """A number of bytes for people: 10.0 GiB, 256 KiB."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.3g} {unit}"
    return f"{count} bytes"


@contextmanager
def opened(path: Path | str, most: int) -> Iterator[IO[bytes]]:
    """A regular file of ``most`` bytes or fewer, for reading.

    Raises OSError, also for what is no regular file and for one that is larger, before anything of
    it is read.
    """
    check(path, most)
    # What lies there may have become a pipe in the meantime.
    descriptor = open_at_once(path)
    with open(descriptor, "rb") as file:
        _check(os.fstat(descriptor), most, path)
        yield file


def open_at_once(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading what lies at ``path``, which isn't waited for. Raises OSError."""
    return os.open(path, _FLAGS)


def check(path: Path | str, most: int) -> None:
    """Raise OSError unless there is a regular file of ``most`` bytes or fewer."""
    if "\0" in os.fspath(path):
        raise OSError("a name can't hold a NUL: correct it")
    _check(os.stat(path), most, path)


def _check(status: os.stat_result, most: int, path: Path | str) -> None:
    kind = next((what for test, what in _KINDS if test(status.st_mode)), None)
    if kind is not None:
        raise OSError(f"this is {kind}, not a regular file: write what it holds to one")
    if stat.S_ISDIR(status.st_mode):
        open(path, "rb").close()  # in the words of the system
    if status.st_size > most:
        raise OSError(
            f"{size_text(status.st_size)}, and no more than {size_text(most)} is read of such a "
            "file: is it the right one?"
        )


def read_bytes(path: Path | str, most: int) -> bytes:
    """The content of a regular file of ``most`` bytes or fewer. Raises OSError."""
    with opened(path, most) as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        if more := file.read(most + 1 - len(content)):  # it grows, or says nothing of its size
            content += more
    if len(content) > most:
        raise OSError(f"more than {size_text(most)}: is it the right file?")
    return content


def is_handed_pipe(path: Path | str) -> bool:
    """Whether a shell made this pipe for the process: ``/dev/stdin``, ``<(COMMAND)``."""
    return bool(_HANDED.fullmatch(os.fspath(path))) and stat.S_ISFIFO(os.stat(path).st_mode)


def read_pipe(path: Path | str, most: int) -> bytes:
    """All that comes from a pipe, until its other end is closed. Raises OSError."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"more than {size_text(most)} came: is it the right command?")
    return content


def read_text(path: Path | str, most: int) -> str:
    """The UTF-8 text of a file, as :func:`read_bytes`, without a byte order mark.

    Raises OSError and UnicodeDecodeError.
    """
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path | str, most: int, **options: Any) -> Any:
    """What a JSON file holds; ``options`` as of json.loads. Raises OSError and ValueError."""
    return parse_json(read_text(path, most), **options)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """As json.loads; what is nested too deeply is a ValueError too."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None
