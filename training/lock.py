"""One run at a time in an output directory."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from distributed.liveness import process_start
from errors import OptionError
from outputs.files import Outputs, reason

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT = 30.0  # seconds between signs of life
SILENCE = 180.0  # seconds without one after which a run on another machine counts as gone
_HELD: set[Path] = set()  # locks of this process; one that could not be removed is none
WRITING = 5.0  # seconds that a process may take to write its name into the file


class RunLock:
    """Holds a folder for this process, until :meth:`release` or its death.

    The lock file names host, process and job. It is stale, and taken over, if its process is gone
    from this host, if it belongs to this very SLURM job (requeued elsewhere), or if a run on
    another host has given no sign of life for a while.

    Raises:
        OptionError: another run holds the folder, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._done = threading.Event()
        self._outputs = Outputs()
        self._unreadable_since: float | None = None
        try:
            while not self._create():
                self._take_over_if_stale()
        except OSError as error:
            raise OptionError("output_dir", reason(error, self.path)) from None
        _HELD.add(self.path.absolute())
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the folder free. Where that can't be written, the next run finds this one gone."""
        self._done.set()
        _HELD.discard(self.path.absolute())
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the lock stays: %s", reason(error, self.path))

    def _create(self) -> bool:
        """Write the lock; False if there is one. Raises OSError and leaves none where it can't."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(_identity()))
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise
        return True

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                os.utime(self.path)
            except OSError as error:
                self._outputs.failed(self.path, error, "another run may take the folder")
            else:
                self._outputs.succeeded(self.path)

    def _take_over_if_stale(self) -> None:
        try:
            age = time.time() - self.path.stat().st_mtime
            holder = _holder(self.path.read_bytes())
        except FileNotFoundError:
            return  # just released
        if holder is None:
            # Being written, or left by a run that had no room for it.
            now = time.monotonic()
            self._unreadable_since = self._unreadable_since or now
            if age < WRITING and now - self._unreadable_since < WRITING:
                time.sleep(0.2)
                return
        elif _alive(holder, age, self.path):
            job = f", job {holder['job']}" if holder["job"] else ""
            raise OptionError(
                "output_dir",
                f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']}{job}:"
                " wait for it, end it, or choose another",
            )
        log.info("%s was left by a run that is gone; taking over", self.path)
        # Of several that take over, the rename lets one through.
        aside = self.path.with_name(f".{LOCK_FILE}.{os.getpid()}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        aside.unlink()


def _holder(text: bytes) -> dict[str, Any] | None:
    """What a lock says; None if it isn't whole."""
    try:
        holder = json.loads(text)
    except ValueError:
        return None
    keys = {"host", "pid", "started", "job"}
    return holder if isinstance(holder, dict) and keys <= holder.keys() else None


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    job = os.environ.get("SLURM_JOB_ID", "")
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return {"host": socket.gethostname(), "pid": pid, "started": process_start(pid), "job": job}


def _alive(holder: dict[str, Any], age: float, path: Path) -> bool:
    me = _identity()
    if holder["host"] == me["host"]:
        if (holder["pid"], holder["started"]) == (me["pid"], me["started"]):
            return path.absolute() in _HELD
        started = process_start(holder["pid"])
        return started is not None and started == holder["started"]
    if holder["job"] and holder["job"] == me["job"]:
        return False
    return age < SILENCE
