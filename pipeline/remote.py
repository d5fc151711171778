"""Copies of remote files: each is fetched whole, once per machine, and kept for a while.

A shard that is read from front to back makes the most of a network; what is drawn from it at random
afterwards comes from the local disk.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from errors import DataError
from utils import written_whole

try:
    import fcntl
except ImportError:  # not a Unix: two processes may fetch the same file, the last one stays
    fcntl = None

TRIES = 3
TIMEOUT = 60  # seconds without a byte
BLOCK = 4 << 20  # bytes


def is_remote(address: str) -> bool:
    """Whether ``address`` is one of fsspec or HTTP, not a path."""
    return "://" in address


class RemoteFolder:
    """A folder at an address, and the local folder of its copies.

    Args:
        address: ``https://…``, or whatever fsspec reads (``s3://``, ``gs://``, ``file://`` …).
        cache: folder of the copies; empty: one in the system's temporary folder.
        limit: bytes that the copies may take; the ones longest unused make room.
    """

    def __init__(self, address: str, cache: str = "", limit: int = 50 << 30) -> None:
        self.address = address.rstrip("/")
        digest = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else ""
        base = Path(cache) if cache else Path(tempfile.gettempdir()) / f"shards-{user}"
        self.folder = base.expanduser() / digest
        self.limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataError(
                f"{self.folder}: no place for copies of {self.address} ({error.strerror}); "
                "name another with --shard-cache"
            ) from None

    def path(self, name: str) -> Path:
        """Where the copy of the file ``name`` is, or will be. Raises DataError for a bad name."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            raise DataError(f"{self.address}: {name!r} is not the name of a file in it")
        return self.folder.joinpath(*parts)

    def fetch(self, name: str, size: int | None = None) -> Path:
        """The copy of ``name``, fetched if it isn't there.

        A copy of another ``size`` in bytes, if it is known, is not whole. Raises OSError.
        """
        path = self.path(name)
        if not self._is_whole(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(path):
                # Another process may have fetched it in the meantime.
                if not self._is_whole(path, size):
                    self._make_room(size or 0)
                    self._copy(name, path, size)
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used now
        return path

    @staticmethod
    def _is_whole(path: Path, size: int | None) -> bool:
        try:
            found = path.stat().st_size
        except OSError:
            return False
        return size is None or found == size

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _copy(self, name: str, path: Path, size: int | None) -> None:
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(2.0**attempt)
            try:
                with written_whole(path, shared=True) as partial:
                    with self._open(name) as source, open(partial, "wb") as target:
                        shutil.copyfileobj(source, target, BLOCK)
                    found = partial.stat().st_size
                    if size is not None and found != size:
                        raise OSError(f"{found} bytes came of {size}")
                return
            except (OSError, ValueError, ImportError) as error:
                problem = str(error) or type(error).__name__
        raise OSError(f"{self.address}/{name} can't be fetched: {problem}")

    def _open(self, name: str) -> IO[Any]:
        address = f"{self.address}/{name}"
        if address.startswith(("http://", "https://")):
            return urllib.request.urlopen(address, timeout=TIMEOUT)
        import fsspec

        return fsspec.open(address, "rb").open()

    def _make_room(self, size: int) -> None:
        """Remove the copies longest unused until ``size`` more bytes fit the limit."""
        copies = []
        for path in self.folder.rglob("*.tar"):
            if path.name.startswith("."):
                continue  # it is being fetched
            with contextlib.suppress(OSError):
                status = path.stat()
                copies.append((status.st_mtime, status.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in copies)
        for _, bytes_, path in sorted(copies):
            if total <= self.limit:
                return
            # A process that has it open reads on.
            path.unlink(missing_ok=True)
            total -= bytes_
