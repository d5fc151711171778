"""How long training waits for images, and its throughput."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.dataset import Batch


class Lap(NamedTuple):
    """What happened between two calls of :meth:`Clock.lap`."""

    images_per_second: float
    """Throughput of this process."""
    data_wait: float
    """Share of the time spent waiting for images."""
    step_seconds: float
    """Of a batch, the wait included."""
    warm_up: bool
    """Whether compilation, allocation and the start of the workers are in it."""


class Clock:
    """Splits the time into waiting for images and the rest.

    The first lap of a session holds the ``warm_up``: compilation, allocation, the start of workers.
    """

    def __init__(self, warm_up: bool) -> None:
        self.start = time.perf_counter()
        self.warm_up = warm_up
        self.waited = 0.0
        self.images = 0
        self.steps = 0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; how long each is waited for is counted."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.images += len(batch.targets)
            self.steps += 1
            yield batch

    def lap(self) -> Lap:
        """What happened since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        lap = Lap(
            images_per_second=self.images / seconds,
            data_wait=self.waited / seconds,
            step_seconds=seconds / max(self.steps, 1),
            warm_up=self.warm_up,
        )
        self.start, self.waited, self.images, self.steps = now, 0.0, 0, 0
        self.warm_up = False
        return lap
