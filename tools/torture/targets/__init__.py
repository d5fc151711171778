"""What is fuzzed: each file of this package has ``TARGETS``, the readers of one subject.

A new reader of foreign bytes or text is a :class:`Target` in the file of its subject; a new file is
found by itself. ``mutation`` makes inputs from valid ones, and odd values from nothing.
"""

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError


@dataclass(frozen=True)
class Target:
    """A reader under attack.

    ``make`` must follow from the random numbers alone: an input is made again by its number.
    """

    name: str
    make: Callable[[random.Random], Any]
    """An input: bytes, a text, or any value whose ``repr`` shows it."""
    attack: Callable[[Any, Path], object]
    """Feeds an input to the reader. The folder is this process's own; files of earlier inputs may
    lie there. Beyond returning or raising, it may assert what must hold of what was read."""
    ours: tuple[type[BaseException], ...] = (UserError,)
    """The errors that are an answer. Any other is a bug, AssertionError and MemoryError too."""
    prepare: Callable[[], object] = int
    """Called once before inputs are read: imports that take seconds."""
    share: float = 1.0
    """Inputs in proportion to other targets: less than 1 for what takes over a millisecond."""


def all_targets() -> dict[str, Target]:
    """Those of all files of this package, by name."""
    found: dict[str, Target] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        for target in getattr(importlib.import_module(f"{__name__}.{module}"), "TARGETS", ()):
            if target.name in found:
                raise ValueError(f"two targets are called {target.name}")
            found[target.name] = target
    return found
