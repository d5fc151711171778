"""Processes that make batches, and what is known of one that dies or hangs.

Each worker has a pipe of its own: nothing is shared that a worker leaves locked or half written
when it is killed. Whoever waits for a batch waits for the end of every worker too, so a death is
noticed at once, whatever the worker was at, and however long a batch may take.
"""

import contextlib
import os
import pickle
import signal
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol

import torch
from torch.utils.data._utils import worker as torch_worker

from pipeline import handover
from pipeline.dataset import Batch, ImageDataset
from pipeline.workers import BATCHES_AHEAD, init_worker
from samplers import SampleKey

SLICE = 1.0  # seconds: a wait is counted in these, so that a suspended job hasn't waited meanwhile
_REAP = 1.0  # seconds for a process that was killed to be gone; storage may hold it for ever

# The main process's ends of all pipes. Whoever is forked closes its copies.
_OPEN: "weakref.WeakSet[Connection]" = weakref.WeakSet()


class WorkerLostError(Exception):
    """A worker has died."""


class NoBatchError(Exception):
    """No batch came within the time that was given."""


class Maker(Protocol):
    """Makes a batch of ``dataset`` in worker number ``worker``."""

    dataset: ImageDataset
    seed: int

    def __call__(self, keys: list[SampleKey], worker: int) -> Batch: ...


class _Request(NamedTuple):
    place: int
    """Row of this worker's keys."""
    count: int
    """Images."""


class WorkerPool:
    """``count`` workers that make batches ahead and give them in order.

    Args:
        make: what a worker does; it is copied to each worker when that starts.
        count: workers, 1 or more.
        batch_size: most images of a batch.
        finish: done to each batch in a thread of this process, while earlier ones are used.

    Attributes:
        pids: of the workers.
    """

    def __init__(
        self,
        make: Maker,
        count: int,
        batch_size: int,
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        context = torch.multiprocessing.get_context()
        forked = context.get_start_method() == "fork"
        # Keys travel through shared memory: a pipe might be full, and the main process would wait.
        width = len(SampleKey._fields)
        self._keys = torch.zeros(count, BATCHES_AHEAD, batch_size, width, dtype=torch.int64)
        self._keys.share_memory_()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._end = weakref.finalize(self, _end, self._processes, self._pipes, os.getpid())
        for number in range(count):
            mine, theirs = context.Pipe()
            _OPEN.add(mine)
            process = context.Process(
                target=_work,
                args=(make, number, count, self._keys[number], theirs, forked),
                daemon=True,
            )
            with _signals_blocked():
                process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._sentinels = [process.sentinel for process in self._processes]
        self._sent = [0] * count  # requests
        self._owed = [0] * count  # answers
        self._finish = finish
        self._thread = ThreadPoolExecutor(1) if finish else None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def kill(self) -> None:
        """End all workers, also one that hangs."""
        self._end()

    def batches(self, keys: Iterator[list[SampleKey]], timeout: float = 0.0) -> Iterator[Batch]:
        """The batches of ``keys``, in their order.

        Raises:
            WorkerLostError: a worker has died; this pool gives no batch any more.
            NoBatchError: one was waited for ``timeout`` seconds; 0 waits for ever.
        """
        count = len(self._pipes)
        for worker in range(count):
            # What was asked for by a pass that was left early.
            while self._owed[worker]:
                self._answer(worker, timeout)
        due: deque[int] = deque()  # workers
        for number in range(count * BATCHES_AHEAD):
            if not self._ask(number % count, keys):
                break
            due.append(number % count)
        if self._thread is None:
            while due:
                yield self._next(due, keys, timeout)
            return
        held: deque[Future[Batch]] = deque()
        while due or held:
            ready = due and (not held or self._pipes[due[0]].poll())
            if ready and len(held) < BATCHES_AHEAD:
                batch = self._next(due, keys, timeout)
                held.append(self._thread.submit(self._finish, batch))
            else:
                yield held.popleft().result()

    def _next(self, due: deque[int], keys: Iterator[list[SampleKey]], timeout: float) -> Batch:
        worker = due.popleft()
        answer = self._answer(worker, timeout)
        if self._ask(worker, keys):
            due.append(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, worker: int, keys: Iterator[list[SampleKey]]) -> bool:
        """Ask a worker for the batch of the next keys; False if there are none."""
        wanted = next(keys, None)
        if wanted is None:
            return False
        place = self._sent[worker] % BATCHES_AHEAD
        self._keys[worker, place, : len(wanted)] = torch.tensor(wanted)
        try:
            self._pipes[worker].send(_Request(place, len(wanted)))
        except OSError:
            raise self._lost(worker) from None
        self._sent[worker] += 1
        self._owed[worker] += 1
        return True

    def _answer(self, worker: int, timeout: float) -> Batch | Exception:
        self._wait(worker, timeout)
        try:
            answer = handover.receive(self._pipes[worker])
        except (EOFError, ConnectionError):
            raise self._lost(worker) from None
        self._owed[worker] -= 1
        return answer

    def _wait(self, worker: int, timeout: float) -> None:
        """Return when something has come from ``worker``. Raises as ``batches``."""
        pipe = self._pipes[worker]
        waited = 0.0
        while not pipe.poll():
            began = time.monotonic()
            at_most = min(SLICE, timeout - waited) if timeout else SLICE
            ready = wait([pipe, *self._sentinels], at_most)
            if pipe in ready:
                break
            # A process that a worker has left behind may hold its sentinel.
            if ready or not all(process.is_alive() for process in self._processes):
                raise self._lost(worker)
            waited += min(time.monotonic() - began, at_most)
            if timeout and waited >= timeout:
                raise NoBatchError

    def _lost(self, worker: int) -> WorkerLostError:
        """What to raise for a death that showed in the pipe of ``worker``, or at any worker."""
        if not wait(self._sentinels, 0):
            # The pipe breaks a moment before the process is gone.
            self._processes[worker].join(_REAP)
        return WorkerLostError()


def _end(processes: Sequence[BaseProcess], pipes: Sequence[Connection], owner: int) -> None:
    """Kill the workers; not in a worker, which has a copy of this pool."""
    if os.getpid() != owner:
        return
    for process in processes:
        process.kill()
    for pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + _REAP
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A worker that is forked inside has no signal delivered: the handlers are the main process's.

    It will ignore them, or wait for SIGTERM (``init_worker``).
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    make: Maker, number: int, count: int, keys: torch.Tensor, pipe: Connection, forked: bool
) -> None:
    """The life of a worker; it ends when the main process closes its end, or is gone."""
    if forked:
        for end in list(_OPEN):
            end.close()
    init_worker(number)
    # Torch has no public way to set what data sets of plug-ins get from get_worker_info().
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=number, num_workers=count, seed=make.seed + number, dataset=make.dataset
    )
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            rows = keys[request.place, : request.count].tolist()
            try:
                # May find no shared memory.
                parcel = handover.packed(make([SampleKey(*row) for row in rows], number))
            except Exception as error:
                parcel = handover.packed(_portable(error, number))
            handover.send(pipe, parcel)
            del parcel  # its memory isn't this process's any more


def _portable(error: Exception, number: int) -> Exception:
    """``error`` as it can travel to the main process, with its traceback as a note."""
    note = "".join(traceback.format_exception(error))
    text = f"{type(error).__name__}: {error}"
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is not type(error) or str(copy) != str(error):
            copy = RuntimeError(text)
    except Exception:
        copy = RuntimeError(text)
    copy.add_note(f"in loader worker {number}:\n{note}")
    return copy
