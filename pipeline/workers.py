"""Loader workers: how many, what each is at, and how they end."""

import ctypes
import math
import os
import shutil
import signal
import sys
import threading
import time
from typing import NamedTuple

import torch

from augmentation.protocol import RGB, Form
from distributed.liveness import process_runs
from utils import cores

BATCHES_AHEAD = 2  # batches that a worker makes ahead
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT, _LARGE = 256 << 20, 32 << 20  # bytes; glibc takes no larger _LARGE


class _Row(NamedTuple):
    pid: int
    index: int  # of the image that the worker is at, -1 for none
    since: float  # time.monotonic()


class WorkerProgress:
    """Which image each worker is at, in memory that the workers share with the main process."""

    def __init__(self, num_workers: int) -> None:
        self._table = torch.zeros(num_workers, len(_Row._fields), dtype=torch.float64)
        self._table.share_memory_()
        self._worker: int | None = None

    def of_worker(self, worker: int | None) -> None:
        """This process is worker number ``worker``, or None, of which nothing is noted."""
        self._worker = worker

    def begin(self, index: int) -> None:
        """This worker begins with the image ``index``."""
        if self._worker is not None:
            self._table.numpy()[self._worker] = os.getpid(), index, time.monotonic()

    def end(self) -> None:
        """This worker is done with its image."""
        self.begin(-1)

    def _rows(self) -> list[_Row]:
        """Those of the workers that have begun."""
        return [_Row(int(pid), int(i), since) for pid, i, since in self._table.tolist() if pid]

    def slower_than(self, seconds: float) -> list[int]:
        """Images that workers have been at for longer."""
        now = time.monotonic()
        return [row.index for row in self._rows() if row.index >= 0 and now - row.since > seconds]

    def died_over(self) -> list[int]:
        """Images over which workers died."""
        return [r.index for r in self._rows() if r.index >= 0 and not process_runs(r.pid)]

    def clear(self) -> None:
        """Forget the workers, which are to be others."""
        self._table.zero_()


def init_worker(worker: int) -> None:
    """Set up a worker: one thread, and signals that only the main process acts on."""
    torch.set_num_threads(1)
    keep_freed_memory()
    die_with_parent()
    # Ctrl-C and SLURM's warnings go to every process; the main one decides what they mean.
    ignored = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    # So does SIGTERM, but with that the main process ends its workers as well: obey it alone.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def die_with_parent() -> None:
    """Ask the system to end this worker when the process that started it is gone.

    Torch's own look for that comes between two batches, and never if storage holds the worker.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Ask glibc to take the memory of one image for the next, without the system in between.

    By itself it soon gives memory back, and the system zeroes each page that is asked for anew.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def _exit_on_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def auto_num_workers(local_world_size: int) -> int:
    """One worker per core and training process of this machine, at most 10."""
    return min(10, cores() // local_world_size)


# --- shared memory -------------------------------------------------------------------------------


def batch_bytes(batch_size: int, size: tuple[int, int], *, by_batch: bool, form: Form = RGB) -> int:
    """Bytes of a training batch on its way from a worker.

    ``size``: height and width of its images, which have the depth of ``form`` where they are
    augmented by the batch on the device, else are float32.
    """
    depth = form.bit_depth // 8 if by_batch else 4
    return batch_size * form.channels * math.prod(size) * depth


def shared_memory_needed(batch: int, num_workers: int, local_world_size: int = 1) -> int:
    """Bytes of shared memory that the workers of all processes of a machine fill at most.

    Each worker has BATCHES_AHEAD batches of training there and as many of evaluation, which are 1.5
    times as large; one more is being handed over. ``batch`` is in bytes (``batch_bytes``).
    """
    if not num_workers:
        return 0
    return math.ceil(2.5 * batch * (BATCHES_AHEAD * num_workers + 1)) * local_world_size


def free_shared_memory(folder: str = "/dev/shm") -> int | None:
    """Bytes of shared memory that are free; None where that isn't known."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def most_workers(batch: int, local_world_size: int, free: int | None) -> int | None:
    """Workers per process whose batches fit ``free`` bytes of shared memory; None: any number.

    The inverse of ``shared_memory_needed``.
    """
    if free is None:
        return None
    return max(0, int(free / local_world_size / (2.5 * batch) - 1) // BATCHES_AHEAD)
