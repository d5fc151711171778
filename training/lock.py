"""One run at a time in an output directory."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from distributed.liveness import process_start
from errors import OptionError, printable
from outputs.files import Outputs, reason

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT = 30.0  # seconds between signs of life
SILENCE = 180.0  # seconds without one after which a run on another machine counts as gone
WRITING = 5.0  # seconds that a process may take to write its name into the file
MOMENT = 0.5  # seconds for which a holder at work is waited for: a signal may have been sent to it
GRACE = 2.0  # seconds that one may take to be gone
SETTLING = 1.0  # seconds in which two that take over at once see each other, without kernel locks
_MOST_BYTES = 1 << 16  # more is no lock of a run
_TYPES = {"host": str, "pid": int, "started": str | None, "job": str}
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
# Neither through a link nor waiting for a pipe's other end; not for programs that are started.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_HELD: set["RunLock"] = set()  # those of this process
_DESCRIPTORS: set[int] = set()  # of their files


class RunLock:
    """Holds a folder for this process, until :meth:`release` or its death.

    Two things say so. The file names host, process and job, and its age is that of the last sign of
    life. On it lies a lock of the kernel (flock(2)), which the kernel takes away with the process:
    of the starters on one host only one can have it. Whoever has made the file and has its lock
    while the file has its name holds the folder; whoever gets the lock of an older file may only
    remove it. flock, and not fcntl's record locks: those are lost as soon as anything in the
    process closes another descriptor of the file. Forked children close theirs at once, so that a
    worker that outlives the run holds nothing.

    A process on another host counts by its signs of life, since its lock may not be seen here,
    unless it is of this very SLURM job (requeued elsewhere). The same rule, and on this host the
    process's number, is all there is on a file system without locks.

    Raises:
        OptionError: another run holds the folder, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file = -1
        self._done = threading.Event()
        self._guard = threading.Lock()
        self._outputs = Outputs()
        self._settling = 0.0
        self._since = time.monotonic()
        self._unreadable_since: float | None = None
        try:
            while not self._create():
                self._remove_stale()
        except OSError as error:
            raise OptionError("output_dir", reason(error, self.path)) from None
        _HELD.add(self)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the folder free. Where that can't be written, the next run finds this one gone."""
        if self not in _HELD:  # released, or of the process that this one was forked from
            return
        self._done.set()
        with self._guard:
            _HELD.discard(self)
            try:
                if _names(self.path, self._file):
                    self.path.unlink()
            except OSError as error:
                log.warning("the lock stays: %s", reason(error, self.path))
            _close(self._file)

    def _create(self) -> bool:
        """Make the file and lock it; False if there is one. Leaves none where it can't."""
        try:
            writable = os.open(self.path, _FLAGS | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        _DESCRIPTORS.add(writable)
        file = -1
        try:
            file = self._fill(writable)
        except BaseException:
            with contextlib.suppress(OSError):
                if _names(self.path, writable):
                    self.path.unlink()
            raise
        finally:
            if file != writable:
                _close(writable)
        if file >= 0:
            self._file = file
        return file >= 0

    def _fill(self, writable: int) -> int:
        """Lock the new file and write into it.

        Returns the descriptor with the lock, -1 if the file is no longer this process's. That is
        one for reading: the disk can be made read-only under it. NFS only locks what is open for
        writing.
        """
        try:
            file = os.open(self.path, _FLAGS | os.O_RDONLY)
        except FileNotFoundError:  # where there are no locks another starter may have removed it
            return -1
        _DESCRIPTORS.add(file)
        locked = held = None
        try:
            locked = self._lock(file)
            if locked is None and (locked := self._lock(writable)):
                held = writable
            if locked is None:
                self._settling = SETTLING
            text = json.dumps(_identity()).encode()
            if os.write(writable, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            time.sleep(self._settling)
            # It may have been taken for an old one that was never written.
            if locked is not False and _names(self.path, writable) and _names(self.path, file):
                held = file if held is None else held
            else:
                held = -1
        finally:
            if held != file:
                _close(file)
        return held

    def _remove_stale(self) -> None:
        """Remove the file if the run that it is of is gone; wait where that isn't known yet.

        Raises OptionError if the run is not.
        """
        try:
            file = _opened(self.path)
        except FileNotFoundError:
            return  # just released
        try:
            if _holder_in(file) is None and self._may_be_in_writing(file):
                time.sleep(0.05)
                return
            locked = self._lock(file)
            if not _names(self.path, file):
                return
            holder = _holder_in(file)
            if locked is None and time.monotonic() - self._since < MOMENT:
                time.sleep(0.02)
                return
            if locked is False or (holder and _alive(holder, file, self.path, locked=bool(locked))):
                raise OptionError("output_dir", _in_use(self.path, holder))
            log.info("%s was left by a run that is gone; taking over", self.path)
            if not locked or (holder and holder["host"] != socket.gethostname()):
                self._settling = SETTLING  # others may not see the lock
            self.path.unlink(missing_ok=True)
        finally:
            os.close(file)

    def _may_be_in_writing(self, file: int) -> bool:
        """Whether a file that isn't whole may become so; it may be of a run that had no room."""
        now = time.monotonic()
        self._unreadable_since = self._unreadable_since or now
        age = time.time() - os.fstat(file).st_mtime  # the storage's clock may be another one
        return age < WRITING and now - self._unreadable_since < WRITING

    def _lock(self, file: int) -> bool | None:
        """Lock an open file; whether it could be.

        A holder that dies, or that is about to remove a stale file, is waited for, one at work for
        no more than a MOMENT. None: there are no locks here.
        """
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                waited = time.monotonic() - self._since
                if waited > (MOMENT if _at_work_here(_holder_in(file)) else GRACE):
                    return False
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                return None
            time.sleep(0.02)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            with self._guard:
                if self._done.is_set():
                    return
                try:
                    self._give_sign()
                except OSError as error:
                    self._outputs.failed(self.path, error, "another run may take the folder")
                else:
                    self._outputs.succeeded(self.path)

    def _give_sign(self) -> None:
        """Touch the file; make it again where it, or the folder, was removed."""
        if not _names(self.path, self._file):
            before = self._file
            self._since = time.monotonic()
            if not self._create():
                raise FileExistsError(errno.EEXIST, "it is another run's now")
            _close(before)
        os.utime(self._file)


def holder_of(folder: Path) -> dict[str, Any] | None:
    """Who holds or held ``folder``: host, pid, started, job; None if no lock says so."""
    try:
        file = _opened(folder / LOCK_FILE)
    except (FileNotFoundError, OptionError):
        return None
    try:
        return _holder_in(file)
    finally:
        os.close(file)


def _opened(path: Path) -> int:
    """A descriptor of the lock file. Raises OptionError if it is no file of a run."""
    # A pipe or a device is not to be opened at all.
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OptionError("output_dir", f"{path} is not a regular file, so no run's: remove it")
    try:
        return os.open(path, _FLAGS | os.O_RDWR)
    except PermissionError:  # another user's
        return os.open(path, _FLAGS | os.O_RDONLY)


def _names(path: Path, file: int) -> bool:
    """Whether the open ``file`` is the one at ``path``."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder_in(file: int) -> dict[str, Any] | None:
    """What a lock says; None if it isn't whole."""
    try:
        holder = json.loads(os.pread(file, _MOST_BYTES, 0))
    except (ValueError, RecursionError):
        return None
    if not isinstance(holder, dict):
        return None
    fits = all(k in holder and isinstance(holder[k], kind) for k, kind in _TYPES.items())
    return holder if fits and 0 < holder["pid"] < 1 << 31 else None


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    job = os.environ.get("SLURM_JOB_ID", "")
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{os.environ.get('SLURM_ARRAY_JOB_ID', job)}_{task}"
    return {"host": socket.gethostname(), "pid": pid, "started": process_start(pid), "job": job}


def _alive(holder: dict[str, Any], file: int, path: Path, *, locked: bool) -> bool:
    """Whether the run that a lock file names is still at work.

    Args:
        holder: what the file says.
        file: the file, open.
        path: its name.
        locked: whether this process has the kernel's lock of it.
    """
    me = _identity()
    if holder["host"] == me["host"]:
        if not locked and (holder["pid"], holder["started"]) == (me["pid"], me["started"]):
            return any(lock.path.absolute() == path.absolute() for lock in _HELD)
        return not locked and _at_work_here(holder)
    if holder["job"] and holder["job"] == me["job"]:
        return False
    sign = os.fstat(file).st_mtime
    age = _storage_time(path.parent) - sign
    if age >= 0:
        return age < SILENCE
    # The clock went back since: only a further sign tells.
    log.info("%s is from the future: waiting %g s for a sign of life", path, 2 * HEARTBEAT)
    deadline = time.monotonic() + 2 * HEARTBEAT
    while (same := os.fstat(file).st_mtime == sign) and time.monotonic() < deadline:
        time.sleep(HEARTBEAT / 50)
    return not same


def _at_work_here(holder: dict[str, Any] | None) -> bool:
    """Whether the process that a lock file names runs on this host."""
    if not holder or holder["host"] != socket.gethostname():
        return False
    started = process_start(holder["pid"])
    return started is not None and started == holder["started"]


def _storage_time(folder: Path) -> float:
    """The time by the clock that dates the files of ``folder``, which another host may have."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _in_use(path: Path, holder: dict[str, Any] | None) -> str:
    who = "another process"
    if holder:
        job = f", job {printable(holder['job'])}" if holder["job"] else ""
        who = f"process {holder['pid']} on {printable(holder['host'])}{job}"
    return f"{path.parent} is in use by {who}: wait for it, end it, or choose another"


def _close(file: int) -> None:
    _DESCRIPTORS.discard(file)
    os.close(file)


def _leave_to_parent() -> None:
    """Close the locks in a forked child: the kernel would keep them as long as it lives."""
    for file in _DESCRIPTORS:
        os.close(file)
    _DESCRIPTORS.clear()
    _HELD.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
