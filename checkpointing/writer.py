"""Writing a run's checkpoints while training goes on, in either format."""

import logging
import shutil
import threading
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
from checkpointing.folder import keep_newest, name_of, save_in_folder, write_best
from checkpointing.sharded import REST, checksum, on_host, split
from distributed.wrapping import whole_on_main
from utils import copy_to_host

log = logging.getLogger(__name__)


def open_writer(folder: Path, *, keep: int, sharded: bool, is_main: bool) -> "CheckpointWriter":
    """The writer of this process; to be called by all processes.

    Args:
        folder: the run's.
        keep: number of checkpoints that stay in it.
        sharded: whether the weights are spread over the processes (FSDP).
        is_main: whether this is the main process.
    """
    if sharded:
        return ShardedWriter(folder, keep=keep)
    return PlainWriter(folder, keep=keep) if is_main else IdleWriter(folder, keep=keep)


class CheckpointWriter(ABC):
    """Writes a run's checkpoints while training goes on; all processes call it alike.

    The file system's errors are kept, not raised: training is worth more than a file.

    Args:
        folder: the run's.
        keep: number of checkpoints that stay in it.

    Attributes:
        needs_content: whether this process writes anything; where not, ``save`` may be left out.
        saved: the newest checkpoint that was written whole.
        error: why the last write failed, or None.
    """

    needs_content = True

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.saved: Path | None = None
        self.error: OSError | None = None
        self._thread: threading.Thread | None = None

    @abstractmethod
    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        """Write ``content`` as it is now, after the write under way, if any, is done.

        Returns once the content is copied to host memory; a thread writes the copy. The name of the
        checkpoint follows from ``content["progress"]``; ``best`` sets ``best.pth`` too.
        """

    def wait(self) -> None:
        """Until everything saved is on disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, write: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=write, args=args)
        self._thread.start()

    def _warn(self, reason: str) -> None:
        log.warning(
            "no checkpoint was written to %s: %s. Training goes on and the older ones stay; "
            "free space there",
            self.folder,
            reason,
        )


class PlainWriter(CheckpointWriter):
    """Writes a checkpoint as one file, ``NAME.pth``."""

    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        self.wait()
        self._start(self._write, copy_to_host(content), best)

    def _write(self, content: Mapping[str, Any], best: bool) -> None:
        try:
            self.saved = save_in_folder(self.folder, content, keep=self.keep, best=best)
            self.error = None
        except OSError as error:
            self.error = error
            self._warn(error.strerror or str(error))


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

    def __init__(self, folder: Path, *, keep: int) -> None:
        super().__init__(folder, keep=keep)
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
                write_best(self.folder, without_optimizer(content) | whole)

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

        def conclude() -> None:
            if self._is_main:
                save_checkpoint(temporary / REST, rest | {"files": checksums})
                _replace_folder(path, temporary)
                keep_newest(self.folder, self.keep, path)

        failure = self._failure(prepare) or self._failure(write_tensors)
        failure = failure or self._failure(add_checksums)
        if failure is None:
            checksums = {k: v for part in self._gather(checksums) for k, v in part.items()}
            failure = self._failure(conclude)
        if failure is None:
            self.saved, self.error = path, None
            return
        self.error = OSError(failure)
        if self._is_main:
            self._warn(failure)
            shutil.rmtree(temporary, ignore_errors=True)

    def _failure(self, action: Callable[[], None]) -> str | None:
        """Do ``action``; the first process's reason, on all, why it failed somewhere."""
        reason = None
        try:
            action()
        except OSError as error:
            reason = error.strerror or str(error)
        except CheckpointException as error:
            reason = "; ".join(f"process {r}: {e[0]}" for r, e in error.failures.items())
        return next((r for r in self._gather(reason) if r is not None), None)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def _replace_folder(path: Path, temporary: Path) -> None:
    """Give the folder ``temporary`` the name ``path``, which another one may have."""
    aside = path.with_name(f".{path.name}.old")
    if path.exists():
        path.rename(aside)
    temporary.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
