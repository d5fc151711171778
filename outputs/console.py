"""Standard output and error that never end a program, whatever becomes of them.

A reader may leave (``| head -1``), a disk be full, a stream be closed (``>&-``), a console know no
``×``: the program goes on to its end.
"""

import contextlib
import copy
import errno
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from errors import printable

# Characters of our messages, for consoles without them.
_PLAIN = {"×": "x", "…": "...", "–": "-", "—": "-", "−": "-", "·": "*", "→": "->"}
_PLAIN |= {"≤": "<=", "≥": ">=", "≈": "~", "±": "+/-", "²": "^2", "⁹": "^9", "µ": "u"}
_LAYOUT = {ord(character): None for character in "\n\t"}
_MOVES = re.compile(r"(\n|\x1b\[A)+")  # of tqdm, from bar to bar
# Libraries speak up from warnings on.
_QUIET = ("timm", "matplotlib", "PIL", "torch", "submitit", "httpx", "httpx2", "huggingface_hub")
_QUIET += ("mlflow", "alembic")


class MessageHandler(logging.Handler):
    """Writes messages to standard output, above a progress bar if one is drawn.

    One with a true attribute ``on_bar`` is shown by the bar already.
    """

    def format(self, record: logging.LogRecord) -> str:
        # A message is one line: a name in it that holds line ends doesn't write others.
        record = copy.copy(record)
        record.msg, record.args = printable(record.getMessage()), ()
        return super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if getattr(record, "on_bar", False):
            return
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)


def say(line: str, *, error: bool = False) -> None:
    """Print one line, whatever the names in it hold; to standard error if it tells of an
    ``error``."""
    print(printable(line), file=sys.stderr if error else sys.stdout, flush=True)


def show_messages(formatter: logging.Formatter, level: int) -> None:
    """Messages from ``level`` up go to standard output too, until :func:`console` is left.

    Libraries are heard from warnings on, with ``level`` DEBUG from INFO on.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, MessageHandler)]:
        root.removeHandler(handler)
    handler = MessageHandler()
    handler.setFormatter(formatter)
    root.addHandler(handler)
    root.setLevel(level)
    libraries = logging.INFO if level <= logging.DEBUG else max(level, logging.WARNING)
    for name in _QUIET:
        logging.getLogger(name).setLevel(libraries)


@contextlib.contextmanager
def each_message_once() -> Iterator[None]:
    """Inside, a message that has been shown isn't shown again, as where work is done twice."""
    shown: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except Exception:  # a format that doesn't fit: the handler says so
            return True
        new = text not in shown
        shown.add(text)
        return new

    handlers = [h for h in logging.getLogger().handlers if isinstance(h, MessageHandler)]
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


@contextlib.contextmanager
def console(*, reader_ends: bool = False) -> Iterator[None]:
    """Inside, printing never raises; what the host set for its messages is there again behind it.

    Args:
        reader_ends: BrokenPipeError is raised all the same, by a program that has no other output
            than what it prints.
    """
    _fill_closed_descriptors()
    # Codes of terminals are shown, not sent: Python's own, in help and tracebacks, too.
    os.environ.setdefault("PYTHON_COLORS", "0")
    names = ["stdout", "stderr"]
    ours = {}
    for name in names:
        stream = getattr(sys, name)
        if not isinstance(stream, _Stream):
            ours[name] = _Stream(name, stream, raises=reader_ends and name == "stdout")
            setattr(sys, name, ours[name])
    loggers = [logging.getLogger(name) for name in (None, *_QUIET)]
    levels = [logger.level for logger in loggers]
    handlers = list(loggers[0].handlers)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for handler in list(loggers[0].handlers):
            if isinstance(handler, MessageHandler) and handler not in handlers:
                loggers[0].removeHandler(handler)
        for name, stream in ours.items():
            stream.leave()
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.inner)


def output_lost() -> bool:
    """Whether a part of standard output could not be written, as on a full disk.

    Not so where nobody reads any more, or where the stream was closed from the start.
    """
    sys.stdout.flush()
    return getattr(sys.stdout, "lost", False)


def _fill_closed_descriptors() -> None:
    """Open closed standard streams to nowhere.

    The next file to be opened, a checkpoint say, would get the number, and in it the output of
    libraries that write to 1 and 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


class _Stream:
    """A text stream, or none, with ``write`` and ``flush`` that don't raise."""

    def __init__(self, name: str, inner: TextIO | None, *, raises: bool) -> None:
        self.inner = inner
        self._name = {"stdout": "standard output", "stderr": "standard error"}[name]
        self._raises = raises
        self._failing = False
        self._written = False  # the last write was taken, by a buffer at least
        self._left = False
        self._gone = inner is None
        self.lost = False  # a part of it, for another reason than that nobody reads it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, text: str) -> int:
        if not self._gone:
            self._carefully(lambda: self.inner.write(self._encodable(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._gone:
            self._carefully(self.inner.flush, flushed=True)

    def isatty(self) -> bool:
        try:
            return not self._gone and self.inner.isatty()
        except ValueError:  # closed
            return False

    def leave(self) -> None:
        """Give the stream back with nothing in it that would fail when the program ends."""
        self._raises = False
        self.flush()
        self._left = True
        if self._failing:
            self._empty()

    def _carefully(self, action: Any, *, flushed: bool = False) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self.inner.closed:
                raise
            self._written = False
            self._fail(error)
        else:
            self._written |= not flushed
            if flushed and self._failing and self._written:
                self._failing = False
                self.write(f"warning: {self._name} can be written again; lines may be missing\n")

    def _fail(self, error: OSError | ValueError) -> None:
        unread = isinstance(error, ValueError) or error.errno in (errno.EPIPE, errno.EBADF)
        self.lost |= not unread
        if unread:
            self._empty()
            self._gone = True
            if self._raises and isinstance(error, BrokenPipeError):
                raise error
        if not (self._failing or self._left or sys.stderr is self):
            self._failing = True
            reason = "its reader left" if unread else error.strerror or error
            print(f"warning: {self._name}: {reason}; going on without it", file=sys.stderr)
        self._failing = True

    def _empty(self) -> None:
        """Drop what the stream holds back: at the end of the program it would raise once more."""
        with contextlib.suppress(OSError, ValueError):
            number = self.inner.fileno()
            kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, number)
                self.inner.flush()
            finally:
                os.dup2(kept, number)
                os.close(kept)
                os.close(nowhere)

    def _encodable(self, text: str) -> str:
        """``text`` with other characters in the place of those that the stream can't show, or that
        would command a terminal."""
        text = _without_codes(text)
        encoding = getattr(self.inner, "encoding", None)
        if text.isascii() or encoding is None:
            return text
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            return "".join(_shown(character, encoding) for character in text)
        return text


def _without_codes(text: str) -> str:
    """``text`` in which only the codes of a progress bar are left, and line ends and tabs."""
    if _MOVES.fullmatch(text):
        return text
    # A bar is a line that begins, and is wiped out by one that ends, with a return.
    bar = text.startswith("\r")
    inner = text.strip("\r") if bar else text
    if not inner.translate(_LAYOUT).isprintable():
        parts = re.split(r"([\n\t])", inner)
        inner = "".join(part if part in "\n\t" else printable(part) for part in parts)
    return f"\r{inner}{chr(13) * text[1:].endswith(chr(13))}" if bar else inner


def _shown(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        plain = _PLAIN.get(character, character)
        return plain.encode("ascii", "backslashreplace").decode("ascii")
    return character
