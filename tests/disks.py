"""Small file systems that fill up or become read-only; they need root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of that size at ``folder``; it counts pages of 4 KiB. Skips without root."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, kibibytes: int) -> None:
    """Give the disk another size, not below what it holds."""
    _mount("-o", f"remount,size={kibibytes}k", str(folder))


def read_only(folder: Path, on: bool = True) -> None:
    """Make the disk read-only, or writable again; no file may be open for writing."""
    _mount("-o", f"remount,{'ro' if on else 'rw'}", str(folder))


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill the disk but for ``leave`` bytes; returns the file that does."""
    path = folder / "fill"
    free = os.statvfs(folder)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - leave, 1))
    return path
