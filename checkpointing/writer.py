"""Writing a run's checkpoints while training goes on, in either format."""

import errno
import logging
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from checkpointing.files import save_checkpoint, without_optimizer
from checkpointing.folder import (
    BEST,
    ON_SIGNAL,
    keep_newest,
    name_of,
    remove,
    remove_leftovers,
    set_best,
)
from checkpointing.sharded import METADATA, REST, checksum, on_host, split
from distributed.wrapping import whole_on_main
from errors import first_line
from outputs.files import Outputs, as_os_error, reason
from utils import bytes_written, copy_to_host

log = logging.getLogger(__name__)

THREAD = "checkpoint"  # name of the one that writes
POLL = 0.2  # seconds between looks at a write under way
GIVE_UP = 20.0  # seconds without a byte


def open_writer(
    folder: Path, *, keep: int, sharded: bool, is_main: bool, outputs: Outputs | None = None
) -> "CheckpointWriter":
    """The writer of this process; to be called by all processes.

    Args:
        folder: the run's.
        keep: number of checkpoints that stay in it.
        sharded: whether the weights are spread over the processes (FSDP).
        is_main: whether this is the main process.
        outputs: the run's, which say what can't be written.
    """
    if is_main:
        remove_leftovers(folder)
    if sharded:
        return ShardedWriter(folder, keep=keep, outputs=outputs)
    kind = PlainWriter if is_main else IdleWriter
    return kind(folder, keep=keep, outputs=outputs)


class CheckpointWriter(ABC):
    """Writes a run's checkpoints while training goes on; all processes call it alike.

    The file system's errors are kept, not raised: training is worth more than a file.

    Args:
        folder: the run's.
        keep: number of checkpoints that stay in it, beside one that a signal asked for.
        outputs: the run's, which say what can't be written.

    Attributes:
        needs_content: whether this process writes anything; where not, ``save`` may be left out.
        saved: the newest checkpoint that was written whole.
        extra: the one that a signal asked for, if there is one. It goes with the next, so that a
            run that was stopped keeps what one that was left alone does.
        error: why the last write failed, or None.
        stopping: tells whether the run is to stop; to be set.
        given_up: whether storage held a checkpoint for too long; nothing more is written.
    """

    needs_content = True

    def __init__(self, folder: Path, *, keep: int, outputs: Outputs | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.outputs = outputs or Outputs()
        self.saved: Path | None = None
        self.extra: Path | None = None
        self.error: OSError | None = None
        self.stopping: Callable[[], bool] = lambda: False
        self.given_up = False
        self._thread: threading.Thread | None = None
        self._unwritten_best: Mapping[str, Any] | None = None

    @abstractmethod
    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        """Write ``content`` as it is now, after the write under way, if any, is done.

        Returns once the content is copied to host memory; a thread writes the copy. The name of the
        checkpoint follows from ``content["progress"]``; ``best`` sets ``best.pth`` too. A best one
        that can't be written is held in memory and tried again with the next save.
        """

    @property
    def lacks_best(self) -> bool:
        """Whether ``best.pth`` could not be written and is missing, or an earlier one."""
        return self._unwritten_best is not None

    def wait(self) -> None:
        """Until everything saved is on disk or has failed.

        Once the run is to stop, storage that takes nothing for GIVE_UP seconds counts as failed.
        """
        if self._thread is None:
            return
        taken, since = -1, time.monotonic()
        while self._thread.is_alive() and not self.given_up:
            self._thread.join(POLL)
            before, taken = taken, bytes_written(self._thread.native_id)
            if taken != before or not self.stopping():
                since = time.monotonic()
            if time.monotonic() - since > GIVE_UP:
                self.given_up = True
                self._fail(self.folder, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        self._thread = None

    def finish(self) -> None:
        """Wait, and try once more to write the best one if it is missing."""
        self.wait()
        if not self.given_up:
            self._write_best(then="that was the last try")

    def _start(self, write: Callable[..., None], *args: Any) -> None:
        if self.given_up:
            return
        # Whoever leaves the process waits as long as it makes sense, and no longer.
        self._thread = threading.Thread(
            target=self._guarded, args=(write, *args), name=THREAD, daemon=True
        )
        self._thread.start()

    def _guarded(self, write: Callable[..., None], *args: Any) -> None:
        try:
            write(*args)
        except Exception as error:  # a fault of the program must not count as saved either
            log.exception("no checkpoint was written to %s", self.folder)
            self.error = OSError(None, f"{type(error).__name__}: {error}")

    def _write_best(
        self,
        write: Callable[[], object] | None = None,
        then: str = "it is held in memory and tried again",
    ) -> None:
        """Write what ``best.pth`` lacks, if anything, by ``write`` or from memory."""
        best, content = self.folder / BEST, self._unwritten_best
        if content is None:
            return
        try:
            write() if write else save_checkpoint(best, content)
        except OSError as error:
            self.outputs.failed(best, error, then)
        else:
            self._unwritten_best = None
            self.outputs.succeeded(best)

    def _make_room(self, path: Path, *, on_signal: bool) -> None:
        """Remove what isn't to be kept any longer, now that ``path`` is there."""
        if self.extra not in (None, path):
            remove(self.extra)
        self.extra = path if on_signal else None
        if not on_signal:
            keep_newest(self.folder, self.keep, path)

    def _succeed(self, path: Path) -> None:
        if self.error is not None:
            log.info("checkpoints can be written again: %s", path)
        self.saved, self.error = path, None

    def _fail(self, path: Path, error: OSError) -> None:
        """Note that ``path`` wasn't written; the first of several is a warning."""
        level = logging.WARNING if self.error is None else logging.INFO
        again = "" if self.error is None else " either"
        self.error = error
        text = reason(error, path)
        log.log(level, "not written%s: %s; training goes on, older ones stay", again, text)


class PlainWriter(CheckpointWriter):
    """Writes a checkpoint as one file, ``NAME.pth``."""

    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        self.wait()
        self._start(self._write, copy_to_host(content), best)

    def _write(self, content: Mapping[str, Any], best: bool) -> None:
        path = self.folder / f"{name_of(content)}.pth"
        if best:
            self._unwritten_best = content
        try:
            save_checkpoint(path, content)
        except OSError as error:
            self._fail(path, error)
            return
        self._succeed(path)
        self._write_best((lambda: set_best(self.folder, path)) if best else None)
        self._make_room(path, on_signal=bool(content.get(ON_SIGNAL)))


class IdleWriter(CheckpointWriter):
    """Writes nothing: the main process writes the file."""

    needs_content = False

    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        pass


class ShardedWriter(CheckpointWriter):
    """Writes a checkpoint as a folder, ``NAME.shards``, to which each process writes its part.

    ``saved`` and ``error`` are the same on all processes. ``best.pth`` is one file with whole
    weights, for whoever uses the model; the main process writes it before :meth:`save` returns.
    """

    def __init__(self, folder: Path, *, keep: int, outputs: Outputs | None = None) -> None:
        super().__init__(folder, keep=keep, outputs=outputs)
        # Of its own, so that the thread's exchanges don't mix with those of training.
        self._group = dist.new_group(backend="gloo")
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._is_main = dist.get_rank() == 0

    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        """Write ``content`` as every writer does. What isn't sharded comes from the main process.

        The other processes' batch-norm statistics become those of the main process too, in place:
        a resumed run begins with them, and this one goes on as a resumed one would.
        """
        self.wait()
        for tensor in content["model"].values():
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor, 0)
        rest, tensors = split(content)
        tensors = {name: on_host(tensor, self._mesh) for name, tensor in tensors.items()}
        self._start(self._write, f"{name_of(content)}.shards", copy_to_host(rest), tensors)
        if best:
            whole: dict[str, dict[str, Tensor] | None] = {
                key: whole_on_main(content[key]) for key in ("model", "model_ema")
            }
            if self._is_main:
                self._unwritten_best = without_optimizer(content) | whole
        self._write_best()

    def _write(self, name: str, rest: dict[str, Any], tensors: dict[str, DTensor]) -> None:
        path, temporary = self.folder / name, self.folder / f".{name}.tmp"
        checksums: dict[str, int] = {}

        def prepare() -> None:
            if self._is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write_tensors() -> None:
            # One thread: with more the order of the tensors in the files would vary.
            writer = dcp.FileSystemWriter(temporary, thread_count=1, overwrite=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)

        def add_checksums() -> None:
            for file in sorted(temporary.glob(f"__{dist.get_rank()}_*.distcp")):
                checksums[file.name] = checksum(file)
            if self._is_main:
                checksums[METADATA] = checksum(temporary / METADATA)

        def conclude() -> None:
            if self._is_main:
                save_checkpoint(temporary / REST, rest | {"files": checksums})
                _replace_folder(path, temporary)
                self._make_room(path, on_signal=bool(rest.get(ON_SIGNAL)))

        failure = self._failure(prepare) or self._failure(write_tensors)
        failure = failure or self._failure(add_checksums)
        if failure is None:
            checksums = {k: v for part in self._gather(checksums) for k, v in part.items()}
            failure = self._failure(conclude)
        if failure is None:
            self._succeed(path)
            return
        self._fail(path, OSError(None, failure))
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)

    def _failure(self, action: Callable[[], None]) -> str | None:
        """Do ``action``; the first process's reason, on all, why it failed somewhere."""
        found = None
        try:
            action()
        except OSError as error:
            found = error.strerror or str(error)
        except CheckpointException as error:
            found = "; ".join(
                f"process {r}: {_short(e[0], self.folder)}" for r, e in error.failures.items()
            )
        return next((r for r in self._gather(found) if r is not None), None)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def _short(error: BaseException, folder: Path) -> str:
    """What a process says of its part, in one line."""
    if isinstance(error, RuntimeError):
        error = as_os_error(error, folder) or error
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _replace_folder(path: Path, temporary: Path) -> None:
    """Give the folder ``temporary`` the name ``path``, which another one may have."""
    aside = path.with_name(f".{path.name}.old")
    if path.exists():
        path.rename(aside)
    temporary.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
