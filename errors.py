"""Errors that a user can fix, and words for their messages.

``main.py`` prints them as one line and exits with their exit code. Everything else is a bug and
keeps its traceback.
"""

import difflib
from collections.abc import Callable, Collection, Sequence


class UserError(Exception):
    """Something about the input, the options or the machine; the message says what to do."""

    exit_code = 2


class OptionError(UserError):
    """An option that can't be used as it was given. The message names the option and the fix."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"--{option.replace('_', '-')}: {message}")
        self.option = option
        self.message = message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Errors travel between processes.
        return type(self), (self.option, self.message)


class DataError(UserError):
    """A data set or an image that can't be read; the message names the file."""


class CheckpointError(UserError):
    """A checkpoint that can't be read, or that belongs to another model or data set."""


class DivergedError(UserError):
    """Training met a loss or gradient that is not finite and ``--on-nonfinite`` stopped it."""

    exit_code = 3


class PeerError(UserError):
    """Another process of the run failed, or is gone; the message names it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemoryError(UserError):
    """The device or the host has too little memory; the message says what helps."""


def did_you_mean(
    name: str,
    known: Collection[str],
    *,
    most: int = 1,
    cutoff: float = 0.6,
    otherwise: str = "",
    shown: Callable[[str], str] = str,
) -> str:
    """``did you mean X or Y?``, the nearest of the ``known`` names; ``otherwise`` where none is.

    ``shown`` turns a known name into what the message says, e.g. an option into its flag.
    """
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(map(shown, near))}?" if near else otherwise


def first_names(names: Sequence[object], most: int = 5) -> str:
    """The first of many names for a message, ``a, b, c, …``."""
    return ", ".join(map(str, names[:most])) + (", …" if len(names) > most else "")
