"""A batch on its way from a worker: its images in shared memory, all else in the worker's pipe.

The memory's file handle goes through that pipe as well. torch's way is that the receiver asks for
each handle, over a connection of its own: a sender that has been killed, or has no handle left for
the connection, never answers. Here what has come is whole, and needs nobody.
"""

import contextlib
import errno
import os
import pickle
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import torch

from pipeline.dataset import Batch


class _Memory(NamedTuple):
    """Where the images lie."""

    size: int
    """Bytes of shared memory."""
    offset: int
    """Values before the first one."""
    kind: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def packed(batch: Batch) -> tuple[bytes, int | None]:
    """``batch`` as bytes, and the file handle of its images, which are moved into shared memory.

    The handle is open as long as the images live; None where they are among the bytes. Raises
    RuntimeError or OSError where there is no memory left, or no file handle.
    """
    if not (hasattr(socket, "send_fds") and _shares_by_handle()):
        return bytes(ForkingPickler.dumps((batch, None))), None
    images = batch.images
    memory = handle = None
    if images.numel():
        # As torch does where it pickles a storage; there is no public way to its handle.
        handle, size = images.untyped_storage()._share_fd_cpu_()
        offset, shape, stride = images.storage_offset(), tuple(images.shape), images.stride()
        memory = _Memory(size, offset, images.dtype, shape, stride)
    arrays = {name: getattr(batch, name).numpy() for name in _tensors(memory)}
    rest = batch._replace(**{"images": None, **arrays})
    return pickle.dumps((rest, memory)), handle


def unpacked(content: bytes, handle: int | None) -> Batch:
    """The batch of what ``packed`` gave; ``handle`` is this process's own, and is closed."""
    batch, memory = pickle.loads(content)
    if isinstance(batch.targets, torch.Tensor):
        return batch
    tensors = {name: torch.from_numpy(getattr(batch, name)) for name in _tensors(memory)}
    if memory is not None:
        try:
            storage = torch.UntypedStorage._new_shared_fd_cpu(handle, memory.size)
        finally:
            os.close(handle)
        images = torch.empty(0, dtype=memory.kind)
        images.set_(storage, memory.offset, memory.shape, memory.stride)
        tensors["images"] = images
    return batch._replace(**tensors)


def _tensors(memory: _Memory | None) -> tuple[str, ...]:
    """Those that go through the pipe as arrays."""
    numbers = ("targets", "indices", "positions")
    return numbers if memory is not None else (*numbers, "images")


def _shares_by_handle() -> bool:
    return torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


@contextlib.contextmanager
def _as_socket(pipe: Connection) -> Iterator[socket.socket]:
    """``pipe`` as what it is; it takes no further file handle."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=pipe.fileno())
    try:
        end.setblocking(True)  # whatever socket.setdefaulttimeout said
        yield end
    finally:
        end.detach()  # or the pipe would be closed


def send_handle(pipe: Connection, handle: int) -> None:
    """Send a file handle. Raises OSError."""
    with _as_socket(pipe) as end:
        socket.send_fds(end, [b"\0"], [handle])


def receive_handle(pipe: Connection) -> int:
    """A file handle that was sent.

    Raises EOFError where the other end is closed, OSError where this process may open no more.
    """
    with _as_socket(pipe) as end:
        content, handles, _, _ = socket.recv_fds(end, 1, 1)
    if not content:
        raise EOFError
    if not handles:  # the kernel had no place for it
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return handles[0]
