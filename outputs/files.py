"""Files of a run that may fail to be written."""

import errno
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from errors import os_error_text

log = logging.getLogger(__name__)

_FULL = 1 << 20  # bytes: a disk with less room is full
_ROOM = 1 << 16  # bytes that a folder has to take


class Outputs:
    """Writes a run's files; training is worth more than any of them.

    What fails is said once, until the same file can be written again, which is said too. It is
    tried again when it is written the next time, and by :meth:`retry`.
    """

    def __init__(self) -> None:
        self._failing: dict[Path, Callable[[Path], object] | None] = {}

    def write(self, path: Path, write: Callable[[Path], object]) -> bool:
        """Call ``write(path)``, whose folder is there; whether the file system let it."""
        try:
            # A run's folder may have been moved away since.
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            self.failed(path, error, "going on without it for now")
            self._failing[path] = write
            return False
        self.succeeded(path)
        return True

    def retry(self) -> None:
        """Write anew what :meth:`write` could not."""
        for path, write in list(self._failing.items()):
            if write is not None:
                self.write(path, write)

    def close(self) -> None:
        """Try once more; say what is missing then."""
        self.retry()
        missing = [str(path) for path, write in self._failing.items() if write is not None]
        if missing:
            log.warning("still not written: %s", ", ".join(missing))

    def failed(self, path: Path, error: OSError, consequence: str) -> None:
        """Say that ``path`` could not be written, unless that is known."""
        if path not in self._failing:
            self._failing[path] = None
            log.warning("not written: %s; %s", reason(error, path), consequence)

    def succeeded(self, path: Path) -> None:
        """Say that ``path`` can be written again, if it could not before."""
        if path in self._failing:
            del self._failing[path]
            log.info("%s can be written again", path)


def reason(error: OSError, path: Path) -> str:
    """Why ``path`` could not be written, in one line; it was tried under a temporary name."""
    return os_error_text(OSError(error.errno, error.strerror or str(error)), path)


def check_writable(folder: Path) -> None:
    """Raise OSError where ``folder`` takes no more files.

    For libraries that write from a process or thread of their own and keep what fails there to
    themselves.
    """
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if file.write(bytes(_ROOM)) < _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def as_os_error(error: Exception, path: Path) -> OSError | None:
    """The error of the file system that a library turned into ``error`` while it wrote ``path``.

    None where it is another one. torch's archives raise ``unexpected pos`` or ``failed writing
    file`` and keep the reason as what came before, unless the error came from another process;
    safetensors gives the number.
    """
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, OSError):
            return before
        before = before.__cause__ or before.__context__
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):
        return OSError(int(found[1]), os.strerror(int(found[1])), str(path))
    if not any(s in text for s in ("unexpected pos", "PytorchStreamWriter", "inline_container")):
        return None
    disk = os.statvfs(next(p for p in (path, *path.parents) if p.exists()))
    number = errno.ENOSPC if disk.f_bavail * disk.f_frsize < _FULL else errno.EIO
    return OSError(number, os.strerror(number), str(path))
