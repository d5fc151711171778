"""Images in, answers out: decoded by a pool of threads, answered in batches by one."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


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
        decode: a file's bytes to (3, H, W). What it raises is the answer of that image alone.
        predict: (B, 3, H, W) to (B, C) probabilities on the CPU; called by one thread. What it
            raises is the answer of the whole batch.
        max_batch: images that the model takes at a time.
        max_wait: seconds that an image waits for others, at most.
        decoders: decoding threads.
        on_batch: called after each batch with its size and the model's seconds.
    """

    def __init__(
        self,
        decode: Callable[[bytes], Tensor],
        predict: Callable[[Tensor], Tensor],
        *,
        max_batch: int,
        max_wait: float,
        decoders: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.decode, self.predict, self.on_batch = decode, predict, on_batch
        self._max_batch, self._max_wait = max_batch, max_wait
        self._waiting: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(decoders, "decode")
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def ask(self, content: bytes) -> Future[Answer]:
        """The answer to an image file, later; cancelled, it costs no more than it has."""
        answer: Future[Answer] = Future()
        self._pool.submit(self._prepare, content, answer)
        return answer

    def close(self) -> None:
        """Answer what was asked, then end the threads."""
        self._pool.shutdown()
        self._waiting.put(None)
        self._thread.join()

    def _prepare(self, content: bytes, answer: Future[Answer]) -> None:
        if answer.cancelled():
            return
        try:
            tensor = self.decode(content)
        except Exception as error:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
        else:
            self._waiting.put(_Asked(tensor, answer))

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
        start = time.perf_counter()
        try:
            rows = self.predict(torch.stack([asked.tensor for asked in batch])).numpy()
        except Exception as error:
            for asked in batch:
                asked.answer.set_exception(error)
            return
        self.on_batch(len(batch), time.perf_counter() - start)
        for asked, row in zip(batch, rows, strict=True):
            asked.answer.set_result(Answer(row, asked.tensor))
