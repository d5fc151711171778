"""What asks a run to stop: signals, and the end of its time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from errors import Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = 0  # in the place of a signal's number
_NOTHING = -1
PATIENCE = 10.0  # seconds that one of several processes goes on waiting for images


class StopRequest:
    """Turns Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 into a request to stop.

    SLURM warns of a time limit or preemption with a signal of the user's choice, and ends a
    cancelled job with SIGTERM. A closed terminal sends SIGHUP, which ``nohup`` has ignored.

    At first a signal raises Stopped wherever the run is: there is nothing to save yet. Within
    :meth:`deferred` it is noted, and the run leaves after the step under way; a wait for images
    (:meth:`waiting`) ends at once. A second Ctrl-C leaves on the spot. In another thread than the
    main one signals stay what they were.

    Every process must leave at the same step, or the others would wait for it in the next gradient
    exchange: :meth:`agreed` is true for all as soon as one process was asked.

    Args:
        hours: those after which :meth:`agreed` is true without a signal; None: never.

    Attributes:
        signal: the first one that came, ``TIME_IS_UP`` or None.
    """

    def __init__(self, hours: float | None = None) -> None:
        self.signal: int | None = None
        self._end = None if hours is None else time.monotonic() + 3600 * hours
        self._asked = 0.0
        self._previous: dict[int, Any] = {}
        self._deferred = False
        self._waiting = False
        self._overdue = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                before = signal.getsignal(number)
                # None: a handler that isn't Python's, and couldn't be put back.
                if before is None or (number == signal.SIGHUP and before == signal.SIG_IGN):
                    continue
                self._previous[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: object) -> None:
        if not self._deferred:
            previous = self._previous[number]
            if callable(previous) and previous is not signal.default_int_handler:
                # Whoever started this run knows what the signal means: submitit requeues the job.
                previous(number, frame)
                return
            self.signal = self.signal or number
            raise Stopped(number)
        # A launcher passes on the Ctrl-C that the terminal has sent to all processes already.
        again = bool(self.signal) and time.monotonic() - self._asked > 1.0
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._asked = number, time.monotonic()
            if number == signal.SIGINT and sys.stderr.isatty():
                # Not a message of logging, whose locks a signal handler must not take.
                os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")
        if self._waiting:
            self._end_wait()

    def agreed(self) -> bool:
        """Whether any process was asked to stop; to be called by all at the same step."""
        if self.signal is None and self._end is not None and time.monotonic() >= self._end:
            self.signal = TIME_IS_UP
        if dist.is_initialized():
            number = torch.tensor([_NOTHING if self.signal is None else self.signal])
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = None if number == _NOTHING else int(number)
        return self.signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is noted for :meth:`agreed`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, while images are waited for, a signal raises Stopped.

        The others of several processes may be in a step that needs this one: it goes on waiting for
        PATIENCE seconds, so that all leave after that step, and then leaves alone.
        """
        self._waiting = True
        try:
            if self.signal:
                self._end_wait()
            yield
        finally:
            self._waiting = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _end_wait(self) -> None:
        if not dist.is_initialized():
            raise Stopped(self.signal)
        if self._overdue:
            raise Stopped(self.signal, alone=True)
        if self._timer is None and self._previous:
            self._timer = threading.Timer(PATIENCE, self._interrupt)
            self._timer.daemon = True
            self._timer.start()

    def _interrupt(self) -> None:
        self._overdue = True
        # Not from here: an exception must come up in the main thread, which a signal wakes.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
