"""One run at a time in an output directory."""

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

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT = 30.0  # seconds between signs of life
SILENCE = 180.0  # seconds without one after which a run on another machine counts as gone


class RunLock:
    """Holds a folder for this process, until :meth:`release` or its death.

    The lock file names host, process and job. It is stale, and taken over, if its process is gone
    from this host, if it belongs to this very SLURM job (requeued elsewhere), or if a run on
    another host has given no sign of life for a while.

    Raises:
        OptionError: another run holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._done = threading.Event()
        me = json.dumps(_identity())
        while True:
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._take_over_if_stale()
                continue
            with os.fdopen(handle, "w") as file:
                file.write(me)
            break
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the folder free."""
        self._done.set()
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                os.utime(self.path)
            except OSError:
                log.warning("%s is gone or can't be reached", self.path)

    def _take_over_if_stale(self) -> None:
        try:
            age = time.time() - self.path.stat().st_mtime
            text = self.path.read_text()
        except FileNotFoundError:
            return  # just released
        try:
            holder = json.loads(text)
        except json.JSONDecodeError:
            if age < 5:
                time.sleep(0.2)  # just being written
                return
            holder = {"host": "?", "pid": 0, "started": "", "job": ""}
        if _alive(holder, age):
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


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    job = os.environ.get("SLURM_JOB_ID", "")
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return {"host": socket.gethostname(), "pid": pid, "started": process_start(pid), "job": job}


def _alive(holder: dict[str, Any], age: float) -> bool:
    me = _identity()
    if holder["host"] == me["host"]:
        started = process_start(holder["pid"])
        return started is not None and started == holder["started"]
    if holder["job"] and holder["job"] == me["job"]:
        return False
    return age < SILENCE
