"""How much memory a process has, and giving back what it has freed."""

import ctypes
import resource
import sys
from pathlib import Path


def address_space() -> int:
    """Bytes of this process's address space; 0 where the system doesn't say."""
    return _pages(0)


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system doesn't say."""
    return _pages(1)


def _pages(column: int) -> int:
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[column]) * resource.getpagesize()


def give_back() -> None:
    """Return freed memory to the system; the C library keeps it for later, else (glibc)."""
    if sys.platform == "linux" and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


_LIBC = ctypes.CDLL(None)
