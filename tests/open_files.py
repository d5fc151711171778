"""How many files a process of a test may open."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


def limit_files(more: int) -> tuple[int, int]:
    """Let this process open only so many further files; returns the limits that it had."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.dup(0) for _ in range(more + 1)]
    for file in opened:
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[-1], limits[1]))
    return limits


@contextmanager
def most_files(more: int) -> Iterator[None]:
    """Inside, this process may open only so many further files."""
    limits = limit_files(more)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
