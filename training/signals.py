"""Signals that ask a run to stop."""

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist


class StopRequest:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a request to stop after the step under way.

    SLURM warns of a time limit or preemption with a signal of the user's choice, and ends a
    cancelled job with SIGTERM.

    Every process must leave at the same step, or the others would wait for it in the next gradient
    exchange: :meth:`agreed` is true for all as soon as one process was asked. A second Ctrl-C
    leaves at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: object) -> None:
        # A launcher passes on the Ctrl-C that the terminal has sent to all processes already.
        again = self.signal is not None and time.monotonic() - self._asked > 1.0
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._asked = number, time.monotonic()
            if number == signal.SIGINT and sys.stderr.isatty():
                # Not a message of logging, whose locks a signal handler must not take.
                os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")

    def agreed(self) -> bool:
        """Whether any process was asked to stop; to be called by all at the same step."""
        if not dist.is_initialized():
            return self.signal is not None
        number = torch.tensor([self.signal or 0])
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self.signal = int(number) or None
        return self.signal is not None
