"""Loaders that survive their workers."""

import errno
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler, Sampler

from errors import DataError, OptionError, Stopped, first_line, os_error_text
from pipeline import jpeg
from pipeline.dataset import Batch, ImageDataset, collate
from pipeline.pool import NoBatchError, WorkerLostError, WorkerPool
from pipeline.workers import WorkerProgress
from samplers import SampleKey
from utils import derive_seed, seed_host

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
    """Of the global generators of the workers, which a plug-in's data set may draw from."""
    timeout: float = 0
    """Seconds to wait for a batch of the workers; 0 waits for ever."""
    alter: bool = False
    """Whether whoever makes a batch also does all of its plan that leaves images uint8: where the
    model is on the CPU, that is work for the workers."""


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

    MOST_LOSSES = 10  # without a batch in between

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
        self._batches = BatchSampler(sampler, settings.batch_size, settings.drop_last)
        self._progress = WorkerProgress(settings.num_workers)
        self._deaths: Counter[int] = Counter()  # workers that died over an image
        self._pins = settings.pin_memory and torch.cuda.is_available()
        self._pool: WorkerPool | None = None  # between two passes the workers stay

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.settings.batch_size

    @property
    def num_workers(self) -> int:
        """Worker processes."""
        return self.settings.num_workers

    @property
    def pids(self) -> list[int]:
        """The worker processes that there are by now."""
        return [] if self._pool is None else self._pool.pids

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
        source = self.dataset.source
        parts = [f"{self.num_workers} workers", source.kept()]
        if not (source.decoded or jpeg.is_fast()):
            parts.append(f"JPEG files decoded by Pillow ({jpeg.HINT})")
        return ", ".join(filter(None, parts))

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
            except (WorkerLostError, NoBatchError) as error:
                losses += 1
                self._recover(losses, slow=isinstance(error, NoBatchError))
                batches = None
                continue
            except (RuntimeError, OSError) as error:
                self._end_workers()  # one may owe the batch that didn't get through
                _name_what_ran_out(error)
                raise
            except (KeyboardInterrupt, Stopped):
                # Storage may hold the workers, and whoever leaves would wait for their end.
                self._end_workers()
                raise
            if batch is None:
                return
            done, losses = done + 1, 0
            if self._deaths:
                for index in batch.indices.tolist():
                    self._deaths.pop(index, None)  # it wasn't to blame
            unusable = self.dataset.is_train and not len(batch.targets)
            if batch.bad and (self.dataset.on_bad_image == "error" or unusable):
                raise DataError(
                    f"{batch.bad[0]} (mend or remove the file"
                    + (")" if unusable else ", or add --on-bad-image skip)")
                )
            yield batch

    def _start(self, done: int) -> Iterator[Batch]:
        """The batches of this pass after the first ``done``."""
        keys = itertools.islice(iter(self._batches), done, None)
        dataset = self.dataset.watched_by(self._progress)
        make = _BatchMaker(dataset, self.settings.seed, self.settings.alter)
        if not self.num_workers:
            batches = map(make, keys)
            return map(_pinned, batches) if self._pins else batches
        if self._pool is None:
            self._pool = WorkerPool(
                make, self.num_workers, self.batch_size, _pinned if self._pins else None
            )
        return self._pool.batches(keys, self.settings.timeout)

    def _end_workers(self) -> None:
        if self._pool is not None:
            self._pool.kill()
            self._pool = None
        self._progress.clear()

    def _recover(self, losses: int, *, slow: bool) -> None:
        """End the workers, for new ones, after one died or (``slow``) no batch came in time.

        Raises DataError where ``on_bad_image`` doesn't say to go on, or going on didn't help.
        """
        timeout = self.settings.timeout
        if slow:
            held = self._held_for(timeout)
            reason = f"not read within {timeout:g} s"
            if not held:
                raise DataError(
                    f"no batch came within {timeout:g} s, though no image hangs: is the "
                    "storage slow? Raise --loader-timeout, or lower --num-workers"
                )
        else:
            held, reason = self._progress.died_over(), "a worker died over it"
        names = ", ".join(self.dataset.sample_id(i) for i in held)
        skip = self.dataset.on_bad_image == "skip"
        if not skip or losses > self.MOST_LOSSES:
            what = f"{names}: {reason}" if names else "a loader worker died between two images"
            fixes = ["mend or remove the file"] if names else []
            fixes += [] if skip else ["add --on-bad-image skip to go on"]
            hints = [", or ".join(fixes)] if fixes else []
            hints += [] if slow else [f"if it was killed, {_NO_MEMORY}"]
            times = f", the {losses}th in a row" if losses > self.MOST_LOSSES else ""
            raise DataError(f"{what}{times} ({'; '.join(hints)})") from None
        self._deaths.update(held)
        for index in held:
            if slow or self._deaths[index] > 1:
                self.dataset.given_up[index] = reason
        lost = f"{reason}: {names}" if names else "a loader worker was lost"
        logger.warning("%s; the workers are started anew", lost)
        self._end_workers()

    def _held_for(self, seconds: float) -> list[int]:
        """The images that workers have been at for nearly as long.

        The workers may have started late: an image that is under way gets its time.
        """
        under_way = set(self._progress.slower_than(0))
        while under_way and not (held := self._progress.slower_than(0.9 * seconds)):
            time.sleep(0.02)
            under_way.intersection_update(self._progress.slower_than(0))
        return held if under_way else []


class _BatchMaker(NamedTuple):
    """Makes a batch of the keys of its images.

    What a source draws from a worker's global generators follows from the batch's place alone.
    """

    dataset: ImageDataset
    seed: int
    alter: bool

    def __call__(self, keys: list[SampleKey], worker: int | None = None) -> Batch:
        self.dataset.progress.of_worker(worker)
        if worker is not None:
            seed_host(derive_seed(self.seed, "batch", keys[0].epoch, keys[0].position))
        batch = collate([self.dataset[key] for key in keys], self.dataset.plan)
        if not self.alter or batch.plan is None:
            return batch
        images = self.dataset.transform.alter(batch.images, batch.plan)
        return batch._replace(images=images, plan=batch.plan.altered())


def _pinned(batch: Batch) -> Batch:
    """``batch`` with what goes to the device in page-locked memory."""
    return batch._replace(images=batch.images.pin_memory(), targets=batch.targets.pin_memory())


def _name_what_ran_out(error: Exception) -> None:
    """Raise DataError if a batch could not be made or handed over for want of memory or files."""
    if _NO_FILE_HANDLE in str(error):
        raise DataError(os_error_text(OSError(errno.EMFILE, _NO_FILE_HANDLE))) from None
    if "shared memory" in str(error) or "No space left" in str(error):
        raise DataError(f"{_NO_MEMORY} ({first_line(error)})") from None


_NO_FILE_HANDLE = os.strerror(errno.EMFILE)
_NO_MEMORY = (
    "memory or shared memory (/dev/shm) ran out: lower --num-workers or --batch-size, or give a "
    "container --shm-size=8g"
)
