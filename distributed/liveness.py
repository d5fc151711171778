"""What the system says of a process of this machine: whether it runs, since when, what it used."""

import os
from pathlib import Path

_EXITING = 0x4  # PF_EXITING of the kernel's flags of a process


def process_runs(pid: int) -> bool:
    """Whether the process ``pid`` is still at work: there, not being ended, and not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    status = _status(pid)
    return not status or status[0] != "Z" and not int(status[6]) & _EXITING


def process_stopped(pid: int) -> bool:
    """Whether the process ``pid`` was stopped by a signal and doesn't go on; Linux."""
    return _status(pid)[:1] in (["T"], ["t"])


def process_start(pid: int) -> str | None:
    """When the process ``pid`` began, to tell it from a later one with the same number.

    A text that means something only in a comparison; empty where the system has no ``/proc``. None
    if the process doesn't run.
    """
    if not process_runs(pid):
        return None
    status = _status(pid)
    return status[19] if status else ""


def cpu_seconds(pid: int) -> float:
    """Seconds of one core that the process ``pid`` has used; Linux."""
    user, system = _status(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _status(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the state on (proc_pid_stat(5)); none without one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
