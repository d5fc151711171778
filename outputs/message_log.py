"""``run.log``: the messages of a run, each with time and level, over all its sessions."""

import errno
import logging
import os
from pathlib import Path

from outputs.console import MessageHandler
from outputs.files import Outputs

RUN_LOG = "run.log"
MOST_HELD = 10_000  # messages, until they can be written


class MessageLog(MessageHandler):
    """Appends messages to a file, whose disk may be full.

    Those that come before :meth:`open`, or while nothing can be written, are held.
    """

    def __init__(self) -> None:
        super().__init__()
        line = "%(asctime)s %(levelname)-7s %(message)s"
        self.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
        self._outputs = Outputs()
        self._path: Path | None = None
        self._held: list[str] = []
        self._writing = False
        self._process = os.getpid()

    def open(self, path: Path) -> None:
        """Write to ``path`` from here on, and what came before."""
        self._path = path
        self._leave_to_others()
        self._write_held()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._leave_to_others()
            if len(self._held) < MOST_HELD:
                self._held.append(self.format(record) + "\n")
            self._write_held()
        except Exception:
            self.handleError(record)

    def _leave_to_others(self) -> None:
        """In a forked process: what was held before is written by the one that it came from."""
        if os.getpid() != self._process:
            self._process, self._held = os.getpid(), []

    def _write_held(self) -> None:
        # What is said of a failure to write comes here too.
        if self._path is None or self._writing:
            return
        self._writing = True
        try:
            while self._held and self._outputs.write(self._path, self._append):
                pass
        finally:
            self._writing = False

    def _append(self, path: Path) -> None:
        data = "".join(self._held).encode()
        count = len(self._held)
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                file.truncate(size)
                raise
        del self._held[:count]

    def close(self) -> None:
        """Write what is held, if that is possible now, and no more."""
        if self._path is not None:
            self._outputs.close()
            self._path = None
        super().close()
