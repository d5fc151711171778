"""The model behind the service: what clients may ask of it, its threads, its answers."""

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from errors import UserError
from inference import OnnxModel
from pipeline.limits import BYTES_PER_PIXEL
from tools import explain
from tools.common import labels, trained
from tools.serve import images
from tools.serve.batcher import Answer, Batcher
from tools.serve.bodies import Bodies
from tools.serve.decoders import Decoders
from tools.serve.drift import DriftMonitor
from tools.serve.images import RefusedError
from tools.serve.metrics import Metrics
from tools.serve.nursery import Nursery
from tools.serve.threads import Threads

DECODER_BYTES = 128 * 2**20  # of a decoding process, beside the file and its pixels


@dataclass(frozen=True)
class Limits:
    """What one client, and all of them together, may ask for."""

    body: int = 16 * 2**20
    """Bytes of a request's body."""
    pixels: int = 50_000_000
    """Of an image, as its header says."""
    images: int = 32
    """In a request."""
    pending: int = 256
    """Images in hand, of all requests together."""
    seconds: float = 10.0
    """From a request's first byte to its answer."""
    bodies: int = 256 * 2**20
    """Bytes of the bodies of all requests together."""
    connections: int = 512
    """Open at a time."""


def decoder_bytes(limits: Limits) -> int:
    """Bytes of memory that a decoding process may take beyond what it begins with."""
    return BYTES_PER_PIXEL * limits.pixels + 2 * limits.body + DECODER_BYTES


@dataclass(frozen=True)
class Batching:
    """How images are brought together; see ``Batcher``."""

    max_batch: int = 16
    """Images that the model takes at a time."""
    max_wait: float = 0.005
    """Seconds that an image waits for others, at most."""
    decoders: int = 1
    """Images decoded at a time."""
    divide: bool = True
    """Whether the model leaves the decoders the cores that they have work for."""


class Service:
    """A model that answers requests: processes, threads, limits, metrics."""

    def __init__(
        self,
        model: trained.Trained,
        name: str,
        nursery: Nursery,
        *,
        limits: Limits,
        batching: Batching,
        drift: DriftMonitor | None = None,
    ) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.classifier = model.classifier
        several = labels.is_multilabel(self.classifier)
        self.thresholds = labels.thresholds_of(self.classifier) if several else None
        self.metrics = Metrics(self.classifier.class_names, drift, self.thresholds)
        self.pending = 0
        self.ending = False
        self.bodies = Bodies(limits.bodies)
        # A session of ONNX Runtime keeps the number it was made with.
        divide = batching.divide and not isinstance(self.classifier.model, OnnxModel)
        self.threads = Threads(torch.get_num_threads(), divide=divide)
        self.decoders = Decoders(
            partial(images.decoded, transform=self.classifier.transform, max_pixels=limits.pixels),
            batching.decoders,
            memory=decoder_bytes(limits),
            nursery=nursery,
            on_decoded=self.threads.count_decoded,
            on_loss=self.metrics.count_lost_decoder,
        )
        self.batcher = Batcher(
            self.decoders.submit,
            self._predict,
            max_batch=batching.max_batch,
            max_wait=batching.max_wait,
            on_batch=self._count_batch,
        )
        self.metrics.waiting.set_function(self.decoders.waiting)
        self.metrics.bodies.set_function(lambda: self.bodies.held)
        self.metrics.threads.set_function(lambda: self.threads.number)
        # An explanation costs several answers: one at a time.
        self.explainer = ThreadPoolExecutor(1, "explain")
        self.explaining = asyncio.Semaphore(1)

    def close(self, seconds: float = 60.0) -> bool:
        """Answer what is in hand, then end processes and threads; False where that takes longer
        than ``seconds``."""
        until = time.monotonic() + seconds
        ended = self.decoders.close(seconds)
        ended &= self.batcher.close(until - time.monotonic())
        self.explainer.shutdown(wait=ended and not self.explaining.locked(), cancel_futures=True)
        return ended and not self.explaining.locked()

    def stuck(self) -> str | None:
        """What has made no progress for longer than a request may take; None: nothing."""
        for what, seconds in (
            ("the model has been at one batch", self.batcher.stalled()),
            ("images wait and none was decoded", self.decoders.stalled()),
        ):
            if seconds > self.limits.seconds:
                return f"{what} for {seconds:.0f} s"
        return None

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Count ``count`` images as pending meanwhile. Raises RefusedError (503) for too many."""
        self.check_room(count)
        self._add_pending(count)
        try:
            yield
        finally:
            self._add_pending(-count)

    def check_room(self, count: int = 1) -> None:
        """Raises RefusedError (503) where ``count`` more images would be too many."""
        if self.pending + count > self.limits.pending:
            raise RefusedError(503, "too many requests are waiting: try again in a second")

    async def answer(self, content: bytes | bytearray | memoryview, until: float) -> Answer:
        """The model's answer to an image file, which is given up at ``until``, by
        ``time.monotonic``. Raises RefusedError."""
        try:
            answer = await asyncio.wrap_future(self.batcher.ask(content, until))
        except RefusedError as error:
            self.metrics.refused.labels(error.status).inc()
            raise
        self.metrics.count_answer(answer)
        return answer

    async def explain(self, answer: Answer, class_index: int | None) -> str:
        """The image as the model sees it under its heat map, a PNG as a data URL.

        Raises RefusedError (422) where the model can't be explained.
        """
        await self.explaining.acquire()
        task = asyncio.get_running_loop().run_in_executor(
            self.explainer, self._explain, answer.tensor, class_index
        )
        # A client whose time is up leaves the thread at work.
        task.add_done_callback(self._end_explaining)
        try:
            return await asyncio.shield(task)
        except UserError as error:
            raise RefusedError(422, str(error)) from None

    def _end_explaining(self, task: asyncio.Future[str]) -> None:
        self.explaining.release()
        task.exception()  # or asyncio would warn of an exception that nobody has read

    def _add_pending(self, count: int) -> None:
        self.pending += count
        self.metrics.pending.set(self.pending)

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        self.threads.apply()
        return trained.probabilities(self.classifier, images.to(self.model.device)).cpu()

    def _count_batch(self, images: int, seconds: float) -> None:
        self.metrics.count_batch(images, seconds)
        self.threads.count_batch(images, seconds)

    def _explain(self, tensor: torch.Tensor, class_index: int | None) -> str:
        heat = explain.heatmap(self.classifier, tensor, class_index)
        drawn = explain.overlay(explain.enlarged(self.model, tensor), heat)
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
