"""Training processes that are started to be killed."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import loggers
import main


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain_curves() -> None:
    """Write a few bytes as ``curves.png``: drawing takes half of the time of so small a run."""
    loggers.draw_curves = lambda records, path, metric="": path.write_bytes(b"curves")


def start(
    argv: Sequence[str], world: int, log: Path, environment: Mapping[str, str] | None = None
) -> list[int]:
    """Fork ``world`` training processes, each the leader of its group; returns their numbers.

    Forking spares each session the seconds that importing torch takes. ``environment`` is added to
    that of the processes.
    """
    port = free_port()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            os.setsid()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            # Whoever forks may have put something else in their place.
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            faulthandler.enable(handle, all_threads=True)
            torch.set_num_threads(1)
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= environment or {}
            code = main.main(argv)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)
    return pids


def wait(
    pids: Sequence[int], deadline: float, at: Callable[[], bool] = lambda: True
) -> list[int] | None:
    """Exit codes once all have ended; None at the first moment ``at`` after the deadline."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline and at():
            return None
        time.sleep(0.0005)
    return list(codes.values())


def kill(pids: Sequence[int]) -> None:
    """SIGKILL the processes, those of them that are left, and their loaders."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # not the leader of its group yet
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def abort(pids: Sequence[int], log: Path) -> list[str]:
    """Have processes that don't end write what they are at to their ``log``; returns its end."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    time.sleep(2)  # until it is written
    kill(pids)
    return log.read_text(errors="replace").splitlines()[-80:]


def loaders_of(pid: int) -> list[int]:
    """The loader workers of a training process of this machine; Linux."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return sorted(found)


def kill_one(pid: int) -> bool:
    """SIGKILL one process; whether it was there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
