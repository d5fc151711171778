"""Copies of remote files: each is fetched whole, once per machine, and kept for a while.

A shard that is read from front to back makes the most of a network; what is drawn from it at random
afterwards comes from the local disk.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from download import Limits, TransferRefusedError, fetch, locked, save
from errors import DataError, printable
from utils import written_whole

TRIES = 3
LISTING_BYTES = 64 << 20  # of the list of shards
INDEX_BYTES = 256 << 20  # of the index of a shard
_PART = 180  # bytes of a name: a file being fetched has a longer one


def is_remote(address: str) -> bool:
    """Whether ``address`` is one of fsspec or HTTP, not a path."""
    return "://" in address


class RemoteFolder:
    """A folder at an address, and the local folder of its copies.

    Args:
        address: ``http://…`` or ``https://…``, or whatever fsspec reads (``s3://``, ``gs://``,
            ``file://`` …).
        cache: folder of the copies; empty: one in the system's temporary folder, which has to be
            this user's alone.
        limit: bytes that the copies may take; the ones longest unused make room.
    """

    def __init__(self, address: str, cache: str = "", limit: int = 50 << 30) -> None:
        self.address = address.rstrip("/")
        digest = hashlib.sha256(os.fsencode(self.address)).hexdigest()[:16]
        self.limit = limit
        base = Path(cache).expanduser() if cache else None
        try:
            self.folder = (base or _own_folder()) / digest
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataError(
                f"{error.filename}: no place for copies of {self.address} ({error.strerror}); "
                "name another with --shard-cache"
            ) from None

    def path(self, name: object) -> Path:
        """Where the copy of the file ``name`` is, or will be. Raises DataError for a bad name."""
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        good = parts and not PurePosixPath(name).is_absolute() and len(name) < 1000
        good = good and "\\" not in name and printable(name) == name
        # What begins with a dot is a lock, or a file being fetched.
        if not good or any(p.startswith(".") or len(p.encode()) > _PART for p in parts):
            shown = printable(repr(name))
            shown = shown if len(shown) <= 100 else shown[:100] + "…"
            raise DataError(f"{self.address}: {shown} is not the name of a file in it")
        return self.folder.joinpath(*parts)

    def fetch(
        self, name: str, size: int | None = None, *, most: int | None = None, fresh: bool = False
    ) -> Path:
        """The copy of ``name``, fetched if it isn't there, or in any case if ``fresh``.

        A copy of another ``size`` in bytes, if it is known, is not whole; one of more than ``most``
        is not taken. Raises OSError.
        """
        path = self.path(name)
        if fresh or not self._is_whole(path, size):
            if size is not None and size > self.limit:
                raise OSError(
                    f"{self.address}/{name} has {size:,} bytes, and all copies may take "
                    f"{self.limit:,}: raise --shard-cache-gb"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path):
                # Another process may have fetched it in the meantime.
                if fresh or not self._is_whole(path, size):
                    self._make_room(size or 0)
                    self._copy(name, path, size, self.limit if most is None else most)
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

    def _copy(self, name: str, path: Path, size: int | None, most: int) -> None:
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(2.0**attempt)
            try:
                with written_whole(path, shared=True) as partial:
                    self._transfer(name, partial, Limits(size=most if size is None else size))
                    found = partial.stat().st_size
                    if size is not None and found != size:
                        raise OSError(f"{found} bytes came of {size}")
                return
            except Exception as error:  # fsspec's file systems raise types of their own
                problem = printable(str(error)) or type(error).__name__
                if isinstance(error, TransferRefusedError | ImportError):
                    break
        raise OSError(f"{self.address}/{name} can't be fetched: {problem}")

    def _transfer(self, name: str, path: Path, limits: Limits) -> None:
        if self.address.startswith(("http://", "https://")):
            return fetch(f"{self.address}/{quote(name)}", path, limits=limits)
        import fsspec

        with fsspec.open(f"{self.address}/{name}", "rb") as source:
            return save(source, path, limits)

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


def _own_folder() -> Path:
    """This user's folder for shards in the system's temporary one, which anyone can write to.

    Raises DataError for one that another user made, may change or leads elsewhere by a link, and
    OSError.
    """
    if not hasattr(os, "getuid"):
        return Path(tempfile.gettempdir()) / "shards"
    folder = Path(tempfile.gettempdir()) / f"shards-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    others = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or others:
        raise DataError(
            f"{folder} is not a folder of this user alone, so shards from it can't be trusted: "
            "remove it, or name another with --shard-cache"
        )
    return folder
