"""Errors that a user can fix, and words for their messages.

``main.py`` prints them as one line and exits with their exit code. Everything else is a bug and
keeps its traceback.
"""

import difflib
import errno
import importlib.util
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# What helps against an error of the operating system.
_OS_FIXES = {
    errno.EACCES: "give this user the right to it (chmod), or choose another place",
    errno.EPERM: "give this user the right to it, or choose another place",
    errno.EROFS: "this file system is read-only: choose another place, or mount it for writing",
    errno.ENOENT: "it isn't there, or no longer",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way: choose another",
    errno.EISDIR: "this is a folder: name a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "links that lead in a circle: remove them",
    errno.EMFILE: "raise the limit of open files (ulimit -n 65536), or take fewer workers",
    errno.ENFILE: "the machine has no file handles left: end other programs",
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "the quota is used up: free space, or choose another place",
    errno.EFBIG: "this file system takes no file of this size: choose another place",
    errno.EIO: "the storage fails: check it",
    errno.ESTALE: "the network storage lost the file: mount it again",
    errno.ETIMEDOUT: "the storage doesn't answer: check it",
}


class UserError(Exception):
    """Something about the input, the options or the machine; the message says what to do."""

    exit_code = 2


class Stopped(BaseException):
    """A signal asked the run to stop, where it could be left at once.

    Not an Exception, so that it passes whatever survives a bad image.

    Attributes:
        exit_code: 128 + the signal's number.
        alone: whether the other processes of the run don't know of it.
        announced: whether the run has said already what became of it.
    """

    def __init__(self, number: int, *, alone: bool = False) -> None:
        super().__init__(
            "interrupted" if number == signal.SIGINT else f"stopped by signal {number}"
        )
        self.exit_code = 128 + number
        self.alone = alone
        self.announced = False


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


@contextmanager
def os_errors_in_words() -> Iterator[None]:
    """Inside, an error of the operating system becomes a UserError, if it is clear what helps.

    So does a path that begins with ``~NAME`` where no user is called so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OS_FIXES:
            raise
        raise UserError(os_error_text(error)) from error
    except RuntimeError as error:  # of Path.expanduser
        if "home directory" not in str(error):
            raise
        raise UserError("a path begins with ~ and the name of no user: write it in full") from error


def os_error_text(error: OSError, path: Path | str | None = None) -> str:
    """An error of the operating system in one line, ``PATH: reason (fix)``.

    ``path`` is named where the error knows none.
    """
    where = error.filename if error.filename is not None else path
    text = error.strerror or str(error) or type(error).__name__
    fix = _OS_FIXES.get(error.errno or 0)
    return (f"{where}: " if where is not None else "") + text + (f" ({fix})" if fix else "")


def without_surrogates(text: str) -> str:
    r"""``text`` as valid Unicode: bytes of a file name that are not UTF-8 are shown as ``\xe9``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that no file name brings, half of a pair
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_utf8(text: str) -> bool:
    """Whether ``text`` holds no bytes of a file name that are not UTF-8."""
    return without_surrogates(text) == text


# They shape letters and emoji where there are such on both sides; elsewhere they only hide.
_JOINERS = re.compile("(?<=[^\0-\u02ff])[\u200c\u200d](?=[^\0-\u02ff])")

_SPACES = "\u00a0\u202f\u3000"  # of French and Chinese texts


def printable(text: str) -> str:
    r"""``text`` on one line, as a terminal shows it character for character.

    A name may hold line ends and commands of terminals, turn the direction of writing round, or
    hide letters: such characters are written as ``\x1b`` or ``\u202e``.
    """
    text = without_surrogates(text)
    if text.isprintable():
        return text
    kept = {found.start() for found in _JOINERS.finditer(text)}
    return "".join(
        c if c.isprintable() or c in _SPACES or i in kept else c.encode("unicode_escape").decode()
        for i, c in enumerate(text)
    )


_LONGEST = 300  # characters of one name or value in a message


def shortened(text: str, most: int = _LONGEST) -> str:
    """``text`` for a message, cut where it is long."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


class _Repr(reprlib.Repr):
    """``repr`` that stays short, and takes no time, for values of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _LONGEST // 2, _LONGEST // 2

    def repr_int(self, value: int, level: int) -> str:
        # Python writes no more than some thousand digits.
        return repr(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxstring]) + ("…" if len(value) > self.maxstring else "")


def shown(value: object) -> str:
    """``repr`` of a foreign value for a message, cut where it is long or deep."""
    return shortened(_Repr().repr(value))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


def lacks_host_memory(error: RuntimeError) -> bool:
    """Whether torch got no memory of the host, for which it has words and no type."""
    return "can't allocate memory" in str(error)


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
    cut = ", ".join(printable(shortened(str(name))) for name in names[:most])
    return cut + (", …" if len(names) > most else "")


# What is imported to load a model, beside this module. Host programs have such names too.
_BESIDE = ("architectures", "augmentation", "bounded", "checkpointing", "config", "distributed")
_BESIDE += ("download", "models", "outputs", "pipeline", "utils")


def _refuse_other_modules() -> None:
    """Raise ImportError, with both files, where another program's module has one of our names.

    What would follow is an error about a missing name, or no error at all.
    """
    root = Path(__file__).resolve().parent
    for name in _BESIDE:
        loaded = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
        places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
        found = [Path(place) for place in places if place]
        if found and not any(path.resolve().is_relative_to(root) for path in found):
            first = f"put {root} first on sys.path"
            how = f"comes first: {first}" if loaded is None else "was imported: import this first"
            raise ImportError(
                f"{name} of {root} can't be imported, {found[-1]} has the same name and {how}, or "
                "use the two in processes of their own"
            )


_refuse_other_modules()
