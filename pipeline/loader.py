"""Loaders that survive their workers."""

import errno
import functools
import itertools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from errors import DataError, OptionError, Stopped, first_line, os_error_text
from pipeline.dataset import Batch, ImageDataset, collate
from pipeline.workers import BATCHES_AHEAD, WorkerProgress, init_worker
from samplers import SampleKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are loaded."""

    batch_size: int
    """Images per batch."""
    num_workers: int = 0
    """Worker processes; 0 loads in the main process."""
    pin_memory: bool = False
    """Whether batches lie in page-locked memory, where there is a CUDA device."""
    drop_last: bool = False
    """Whether a last batch that is not full is left out."""
    seed: int = 0
    """Of the loader's own generator."""
    timeout: float = 0
    """Seconds to wait for a batch of the workers; 0 waits for ever."""


class TooFewImagesError(OptionError):
    """An epoch has fewer images than an option asks for; ``images`` per process."""

    def __init__(self, option: str, message: str, images: int) -> None:
        super().__init__(option, message)
        self.images = images

    def __reduce__(self) -> tuple[type, tuple[str, str, int]]:
        return type(self), (self.option, self.message, self.images)


class Loader:
    """Batches of a data set in the sampler's order; the same ones for every ``num_workers``.

    ``len`` is the number of batches to come. The sampler may change its epoch between passes.

    A worker that dies, or that an image holds for more than ``timeout`` seconds, is named. With
    ``on_bad_image`` "skip" the workers are started anew behind the last batch that came, and the
    image counts as unreadable: at once if it took too long, if its worker died on its second try.
    What is random is a function of an image's position, so the batches are the same as ever.

    Raises OptionError where ``drop_last`` would leave nothing.
    """

    MOST_LOSSES = 5  # without a batch in between

    def __init__(self, dataset: ImageDataset, sampler: Sampler, settings: LoaderSettings) -> None:
        if settings.drop_last and len(sampler) < settings.batch_size:
            raise TooFewImagesError(
                "batch_size",
                f"{settings.batch_size} is more than the {len(sampler)} images per process: "
                "lower it",
                len(sampler),
            )
        self.dataset = dataset
        self.sampler = sampler
        self.settings = settings
        self._batches = RemainingBatches(sampler, settings.batch_size, settings.drop_last)
        self._timeout = settings.timeout if settings.num_workers else 0
        self._progress = WorkerProgress(settings.num_workers)
        self._deaths: Counter[int] = Counter()  # workers that died over an image
        # Its own, so that starting a pass draws nothing from the global one.
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._workers = self._new_workers()

    def _new_workers(self) -> DataLoader:
        settings = self.settings
        return DataLoader(
            self.dataset.watched_by(self._progress),
            batch_sampler=self._batches,
            num_workers=settings.num_workers,
            collate_fn=functools.partial(collate, plan=self.dataset.plan),
            pin_memory=settings.pin_memory and torch.cuda.is_available(),
            timeout=self._timeout,
            worker_init_fn=init_worker,
            prefetch_factor=BATCHES_AHEAD if settings.num_workers else None,
            persistent_workers=settings.num_workers > 0,
            generator=self._generator,
        )

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.settings.batch_size

    @property
    def num_workers(self) -> int:
        """Worker processes."""
        return self.settings.num_workers

    @property
    def cached(self) -> bool:
        """Whether images come decoded from memory."""
        return self.dataset.source.bytes_in_memory > 0

    @property
    def from_store(self) -> bool:
        """Whether whole batches are taken from memory at once."""
        return False

    def introduction(self) -> str:
        """Where images come from, for the log."""
        kept = self.dataset.source.bytes_in_memory
        memory = f", {kept / 2**20:.1f} MiB of images in ram" if kept else ""
        return f"{self.num_workers} workers{memory}"

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        done = losses = 0
        batches: Iterator[Batch] | None = None
        while True:
            try:
                if batches is None:
                    batches = self._start(done)
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                # A batch of a worker that died in handing it over fails with a broken connection.
                losses += 1
                self._recover(error, losses)
                batches = None
                continue
            except (KeyboardInterrupt, Stopped):
                # Storage may hold the workers, and whoever leaves would wait for their end.
                self._progress.kill()
                self._workers = self._new_workers()
                raise
            if batch is None:
                return
            done, losses = done + 1, 0
            unusable = self.dataset.is_train and not len(batch.targets)
            if batch.bad and (self.dataset.on_bad_image == "error" or unusable):
                raise DataError(
                    f"{batch.bad[0]} (mend or remove the file"
                    + (")" if unusable else ", or add --on-bad-image skip)")
                )
            yield batch

    def _start(self, done: int) -> Iterator[Batch]:
        """The batches of this pass after the first ``done``."""
        self._batches.skip = done
        # Otherwise torch raises wherever the main process is at the moment when a worker dies.
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._workers)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        self._batches.skip = 0
        return batches

    def _recover(self, error: Exception, losses: int) -> None:
        """Make ready for new workers.

        Raises DataError if an image is to blame or memory ran out, ``error`` if it is a bug.
        """
        slow = "DataLoader timed out" in str(error)
        if not slow and not self._worker_died(error):
            if any(sign in str(error) for sign in _NO_FILE_HANDLES):
                raise DataError(os_error_text(OSError(errno.EMFILE, _NO_FILE_HANDLES[0]))) from None
            if "shared memory" in str(error) or "No space left" in str(error):
                raise DataError(f"{_NO_MEMORY} ({first_line(error)})") from None
            raise error
        if slow:
            held = self._progress.slower_than(0.9 * self._timeout)
            reason = f"not read within {self._timeout:g} s"
            if not held:
                raise DataError(
                    f"no batch came within {self._timeout:g} s, though no image hangs: is the "
                    "storage slow? Raise --loader-timeout, or lower --num-workers"
                )
        else:
            held, reason = self._progress.died_over(), "a worker died over it"
        names = ", ".join(self.dataset.sample_id(i) for i in held)
        skip = self.dataset.on_bad_image == "skip"
        if not skip or losses > self.MOST_LOSSES:
            what = f"{names}: {reason}" if names else "a worker died"
            more = "" if skip else ", or add --on-bad-image skip"
            hint = "" if slow else f"; if it was killed, {_NO_MEMORY}"
            raise DataError(f"{what} (mend or remove the file{more}{hint})") from None
        self._deaths.update(held)
        for index in held:
            if slow or self._deaths[index] > 1:
                self.dataset.given_up[index] = reason
        lost = f": {names}" if names else " (a worker was lost)"
        logger.warning("%s%s; the workers are started anew", reason, lost)
        self._progress.kill()
        self._workers = self._new_workers()

    def _worker_died(self, error: Exception) -> bool:
        """Whether ``error`` comes from a worker's death."""
        # Its connection breaks a moment before the system lists it as ended.
        deadline = time.monotonic() + (1.0 if isinstance(error, OSError | EOFError) else 0.0)
        while not self._progress.some_died():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True


# The second one is what torch says where a worker's batch can't be handed over.
_NO_FILE_HANDLES = (os.strerror(errno.EMFILE), "received 0 items of ancdata")
_NO_MEMORY = (
    "memory or shared memory (/dev/shm) ran out: lower --num-workers or --batch-size, or give a "
    "container --shm-size=8g"
)


class RemainingBatches(Sampler[list[SampleKey]]):
    """The sampler's batches after the first ``skip``."""

    def __init__(self, sampler: Sampler, batch_size: int, drop_last: bool) -> None:
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return itertools.islice(iter(self.batches), self.skip, None)
