"""Images in, answers out: decoded by a pool, answered in batches by one thread."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tools.serve.decoders import Content


class Answer(NamedTuple):
    """The model's answer to one image."""

    probabilities: np.ndarray
    """(C,) float32."""
    tensor: Tensor
    """The image as the model took it, (3, H, W)."""


class _Asked(NamedTuple):
    tensor: Tensor
    answer: Future[Answer]


class Batcher:
    """Dynamic batching: the model takes what waits, and waits a moment for more.

    Args:
        decode: a file's bytes, and when they are given up (``time.monotonic``), to (3, H, W),
            later. What it raises is the answer of that image alone.
        predict: (B, 3, H, W) to (B, C) probabilities on the CPU; called by one thread. What it
            raises is the answer of the whole batch.
        max_batch: images that the model takes at a time.
        max_wait: seconds that an image waits for others, at most.
        on_batch: called after each batch with its size and the model's seconds.
    """

    def __init__(
        self,
        decode: Callable[[Content, float], Future[Tensor]],
        predict: Callable[[Tensor], Tensor],
        *,
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.decode, self.predict, self.on_batch = decode, predict, on_batch
        self._max_batch, self._max_wait = max_batch, max_wait
        self._waiting: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._began: float | None = None  # when the model took what it is at
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def ask(self, content: Content, until: float) -> Future[Answer]:
        """The answer to an image file, later; cancelled, it costs no more than it has."""
        answer: Future[Answer] = Future()
        tensor = self.decode(content, until)
        tensor.add_done_callback(partial(self._pass_on, answer))
        answer.add_done_callback(lambda _: tensor.cancel())
        return answer

    def stalled(self) -> float:
        """Seconds that the model has been at one batch."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self, seconds: float) -> bool:
        """Answer what was decoded, then end the thread; False where that takes longer."""
        self._waiting.put(None)
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def _pass_on(self, answer: Future[Answer], tensor: Future[Tensor]) -> None:
        try:
            self._waiting.put(_Asked(tensor.result(), answer))
        except CancelledError:
            pass
        except Exception as error:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)

    def _work(self) -> None:
        while True:
            batch, ended = self._gather()
            batch = [asked for asked in batch if asked.answer.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)
            if ended:
                return

    def _gather(self) -> tuple[list[_Asked], bool]:
        """The next images, and whether they are the last."""
        first = self._waiting.get()
        if first is None:
            return [], True
        batch, until = [first], time.monotonic() + self._max_wait
        while len(batch) < self._max_batch:
            try:
                asked = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if asked is None:
                return batch, True
            batch.append(asked)
        return batch, False

    def _answer(self, batch: Sequence[_Asked]) -> None:
        self._began = start = time.monotonic()
        try:
            rows = self.predict(torch.stack([asked.tensor for asked in batch])).numpy()
        except Exception as error:
            for asked in batch:
                asked.answer.set_exception(error)
            return
        finally:
            self._began = None
        self.on_batch(len(batch), time.monotonic() - start)
        for asked, row in zip(batch, rows, strict=True):
            asked.answer.set_result(Answer(row, asked.tensor))
