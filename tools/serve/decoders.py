"""A pool of decoding processes: an image costs its own time and memory, and nobody else's.

An image whose time is up, or that brings its process down, loses its answer; the process is
replaced. One that takes long makes room: it goes on beside the others, and is killed only if all
processes are at such images and others wait.
"""

import contextlib
import logging
import multiprocessing
import queue
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tools.serve import decoder
from tools.serve.images import RefusedError
from tools.serve.nursery import Nursery

SLOW = 1.0  # seconds, after which an image no longer counts among those decoded at a time
CROWDED = 5.0  # seconds that a slow image gets even while others wait: large ones take some
SPARE = 1  # processes more than images decoded at a time: with a slow image in each, one is left
TICK = 0.05  # seconds between two looks at the clock
MOST_BYTES = 2**28  # of a tensor: more comes from no decoder of ours

Content = bytes | bytearray | memoryview  # of an image file

log = logging.getLogger(__name__)


class DecoderError(Exception):
    """An error inside of a decoding process; the message is its traceback."""


@dataclass(eq=False)
class _Job:
    content: Content
    until: float  # time.monotonic()
    tensor: Future[Tensor] = field(default_factory=Future)
    began: float = 0.0
    slow: bool = False
    again: bool = False  # the first process ended, perhaps through no fault of this image
    killed: RefusedError | None = None  # what the client is told then


class _Process:
    """A process and the connection to it."""

    def __init__(self, nursery: Nursery, task: decoder.Task) -> None:
        self._nursery = nursery
        self.connection, theirs = multiprocessing.Pipe()
        self._poll = select.poll()  # faster than the connection's own
        self._poll.register(self.connection, select.POLLIN)
        with theirs:
            self._process = nursery.fork(theirs.fileno())
        with contextlib.suppress(OSError):  # it is gone already, as its first image will find
            self.connection.send(task)

    def decode(self, content: Content) -> tuple[Tensor, float]:
        """The reply, and the seconds of CPU time that it took.

        Raises RefusedError, DecoderError; EOFError or OSError where it has ended.
        """
        self.connection.send_bytes(content)
        status, *shape, seconds = decoder.HEAD.unpack(self.connection.recv_bytes(decoder.HEAD.size))
        data = self.connection.recv_bytes(MOST_BYTES)
        if status == decoder.DECODED:
            # A copy, as what came can't be written to, which torch warns of.
            tensor = torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy())
            return tensor, seconds
        text = data.decode(errors="replace")
        raise DecoderError(text) if status == 500 else RefusedError(status, text)

    def has_ended(self) -> bool:
        """Whether it is gone, as it says nothing without being asked."""
        return bool(self._poll.poll(0))

    def kill(self) -> None:
        """End it, whatever it is at: who waits for its reply gets EOFError."""
        self._nursery.kill(self._process)

    def end(self) -> int | None:
        """End it for good; returns the exit code that it had."""
        self.connection.close()
        return self._nursery.end(self._process)


class Decoders:
    """Threads that have a process each, for one image at a time; the processes are there at once.

    Args:
        decode: an image file's bytes to (3, H, W) float32; carried out in the processes, so it must
            be possible to pickle it. It may raise RefusedError.
        number: images that are decoded at a time.
        memory: bytes that a process may take beyond what it begins with.
        nursery: what the processes are forked from; it is closed in the end.
        on_decoded: called with the seconds of CPU time of each image that was decoded.
        on_loss: called with ``"time"``, ``"crowd"`` or ``"crash"`` when a process is lost.
    """

    def __init__(
        self,
        decode: decoder.Decode,
        number: int,
        *,
        memory: int,
        nursery: Nursery,
        on_decoded: Callable[[float], None] = lambda seconds: None,
        on_loss: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._nursery = nursery
        self._start = partial(_Process, nursery, decoder.Task(decode, memory))
        self._on_decoded, self._on_loss = on_decoded, on_loss
        self._lock = threading.Lock()  # of what is being decoded
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._turns = threading.Semaphore(number)
        self._running: dict[_Job, _Process] = {}
        self._moved = time.monotonic()  # when an image was last done
        self._closed = threading.Event()
        ready = [self._start() for _ in range(number)] + [None] * SPARE
        self._threads = [
            threading.Thread(target=self._work, args=(process,), name="decode", daemon=True)
            for process in ready
        ]
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        for thread in (*self._threads, self._watcher):
            thread.start()

    def submit(self, content: Content, until: float) -> Future[Tensor]:
        """The tensor of an image file, later.

        The future raises RefusedError where there is none: also at ``until``, by
        ``time.monotonic``, when its process is killed.
        """
        job = _Job(content, until)
        if not self.waiting():
            self._moved = time.monotonic()
        self._jobs.put(job)
        return job.tensor

    def waiting(self) -> int:
        """Images that no process has begun with."""
        return self._jobs.qsize()

    def stalled(self) -> float:
        """Seconds for which images have waited and none was done."""
        return time.monotonic() - self._moved if self.waiting() else 0.0

    def close(self, seconds: float) -> bool:
        """Decode what was submitted, then end threads and processes; False where that takes longer
        than ``seconds``."""
        until = time.monotonic() + seconds
        for _ in self._threads:
            self._jobs.put(None)
            self._turns.release()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._closed.set()
        self._watcher.join()
        self._nursery.close()
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self, process: _Process | None) -> None:
        while True:
            self._turns.acquire()
            job = self._jobs.get()
            if job is None:
                break
            if job.tensor.set_running_or_notify_cancel():
                process = self._answer(job, process)
            if not job.slow:
                self._turns.release()
            del job  # its content isn't kept for the time until the next one
        if process is not None:
            process.end()

    def _answer(self, job: _Job, process: _Process | None) -> _Process | None:
        """Carry out ``job``; returns the process if it can take another one."""
        if time.monotonic() >= job.until:
            job.tensor.set_exception(RefusedError(504, "the answer did not come in time"))
            return process
        if process is not None and process.has_ended():
            log.warning("a decoding process ended with exit code %s", process.end())
            process = None
        result: Tensor | Exception
        try:
            if process is None:
                process = self._start()
            with self._lock:
                job.began = time.monotonic()
                self._running[job] = process
            result, seconds = process.decode(job.content)
            self._on_decoded(seconds)
        except Exception as error:
            result = error
        with self._lock:
            self._running.pop(job, None)
            self._moved = time.monotonic()
        lost = isinstance(result, EOFError | OSError)
        if process is not None and (lost or job.killed):
            code, process = process.end(), None
            if lost and job.killed:
                result = job.killed
            elif lost:
                log.warning("a decoding process ended at an image (exit code %s)", code)
                self._on_loss("crash")
                if not job.again and not job.slow:
                    job.again = True
                    return self._answer(job, None)
                result = RefusedError(422, "the image can't be decoded: it ended its decoder")
        if isinstance(result, Exception):
            job.tensor.set_exception(result)
        else:
            job.tensor.set_result(result)
        return process

    def _watch(self) -> None:
        while not self._closed.wait(TICK):
            with self._lock:
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Kill what is over its time; let what is slow make room."""
        at_work = [job for job in self._running if not job.killed]
        for job in at_work:
            if now >= job.until:
                self._kill(job, "time", RefusedError(504, "decoding took too long"))
            elif not job.slow and now - job.began > SLOW:
                job.slow = True
                self._turns.release()
        slow = [job for job in at_work if job.slow and not job.killed]
        if len(slow) == len(self._threads) and self.waiting():
            oldest = min(slow, key=lambda job: job.began)
            if now - oldest.began > CROWDED:
                told = RefusedError(503, "decoding took long, and others wait")
                self._kill(oldest, "crowd", told)

    def _kill(self, job: _Job, reason: str, told: RefusedError) -> None:
        job.killed = told
        self._running[job].kill()
        log.warning("killed a decoding process after %.1f s", time.monotonic() - job.began)
        self._on_loss(reason)
