"""A batch on its way from a worker: what is large in shared memory, the rest in the worker's pipe.

The memory's file handles go through that pipe as well, with the message. torch's way is that the
receiver asks for each handle, over a connection of its own: a sender that has been killed, or has
no handle left for the connection, never answers. Here what has come is whole, and needs nobody.
"""

import contextlib
import errno
import os
import pickle
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import numpy as np
import torch

from pipeline.dataset import Batch

# Bytes of a message, which the system takes at once: it is there as a whole, or it isn't. Several
# fit in a pipe, so that no worker waits for the main process before it goes on.
MOST_IN_PIPE = 32 * 2**10
MOST_HANDLES = 2  # of a message: the images, and what else is too large for the pipe
PATIENCE = 5.0  # seconds to wait while too many handles of this user are on their way
_HEAD = struct.Struct("<IB")  # bytes that follow, file handles


class _Memory(NamedTuple):
    """Where a tensor lies in shared memory."""

    size: int
    """Bytes of it."""
    offset: int
    """Values before the first one."""
    kind: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Parcel(NamedTuple):
    """What is sent."""

    content: bytes
    handles: tuple[int, ...] = ()
    """Open as long as ``tensors`` live."""
    tensors: tuple[torch.Tensor, ...] = ()
    """In shared memory."""


def packed(answer: Batch | Exception) -> Parcel:
    """A batch, whose images are moved into shared memory, or why there is none.

    Raises RuntimeError or OSError where there is no memory left, or no file handle.
    """
    if not _sends_handles():
        return Parcel(bytes(ForkingPickler.dumps(answer)))
    shared: list[tuple[int, _Memory, torch.Tensor]] = []
    if isinstance(answer, Batch):
        images = answer.images
        if images.numel():
            shared.append((*_shared(images), images))
            answer = answer._replace(images=None)
        fields = answer._asdict().items()
        arrays = {name: x.numpy() for name, x in fields if isinstance(x, torch.Tensor)}
        answer = answer._replace(**arrays)
    content = pickle.dumps(answer)
    if len(content) > MOST_IN_PIPE:
        large = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        shared.append((*_shared(large), large))
        content = b""
    handles, memories, tensors = zip(*shared, strict=True) if shared else ((), (), ())
    return Parcel(pickle.dumps((content, memories)), handles, tensors)


def send(pipe: Connection, parcel: Parcel) -> None:
    """Send a parcel to who calls :func:`receive`. Raises OSError."""
    if not _sends_handles():
        pipe.send_bytes(parcel.content)
        return
    message = _HEAD.pack(len(parcel.content), len(parcel.handles)) + parcel.content
    with _as_socket(pipe) as end:
        sent = _sent_with(end, message, parcel.handles) if parcel.handles else 0
        end.sendall(message[sent:])


def receive(pipe: Connection) -> Batch | Exception:
    """What was sent.

    Raises EOFError or ConnectionError where the sender is gone, OSError where this process, or the
    sender, may open no more files.
    """
    if not _sends_handles():
        try:
            content = pipe.recv_bytes()
        except OSError:  # in the middle of a message
            raise EOFError from None
        return pickle.loads(content)
    with _as_socket(pipe) as end:
        head, handles, _, _ = socket.recv_fds(end, _HEAD.size, MOST_HANDLES)
        try:
            if len(head) < _HEAD.size:
                raise EOFError
            length, count = _HEAD.unpack(head)
            content = _read(end, length)
            if len(handles) < count:  # the kernel had no place for them
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return _unpacked(content, handles)
        finally:
            for handle in handles:
                os.close(handle)


def _unpacked(message: bytes, handles: Sequence[int]) -> Batch | Exception:
    content, memories = pickle.loads(message)
    tensors = [_mapped(handle, memory) for handle, memory in zip(handles, memories, strict=True)]
    answer = pickle.loads(content or tensors.pop().numpy())
    if isinstance(answer, Exception):
        return answer
    fields = answer._asdict().items()
    found = {name: torch.from_numpy(x) for name, x in fields if isinstance(x, np.ndarray)}
    if tensors:
        found["images"] = tensors[0]
    return answer._replace(**found)


def _shared(tensor: torch.Tensor) -> tuple[int, _Memory]:
    """Move ``tensor`` into shared memory; its file handle there, and what it is."""
    # As torch does where it pickles a storage; there is no public way to its handle.
    handle, size = tensor.untyped_storage()._share_fd_cpu_()
    offset, shape, stride = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return handle, _Memory(size, offset, tensor.dtype, shape, stride)


def _mapped(handle: int, memory: _Memory) -> torch.Tensor:
    try:
        storage = torch.UntypedStorage._new_shared_fd_cpu(handle, memory.size)
    except RuntimeError as error:
        if "duplicate" not in str(error):
            raise
        # torch doesn't say why.
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
    tensor = torch.empty(0, dtype=memory.kind)
    return tensor.set_(storage, memory.offset, memory.shape, memory.stride)


def _sends_handles() -> bool:
    """Whether this system has pipes that take file handles, and torch memory that has one.

    The same in all processes, whatever strategy one of them has set.
    """
    strategies = torch.multiprocessing.get_all_sharing_strategies()
    return "file_descriptor" in strategies and hasattr(socket, "send_fds")


def _sent_with(end: socket.socket, message: bytes, handles: Sequence[int]) -> int:
    """How many bytes went with the handles; 0 where they can't go, as the receiver will see."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() <= until:
        try:
            return socket.send_fds(end, [message], handles)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
        time.sleep(0.01)
    return 0


@contextlib.contextmanager
def _as_socket(pipe: Connection) -> Iterator[socket.socket]:
    """``pipe`` as what it is; it takes no further file handle."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=pipe.fileno())
    try:
        end.setblocking(True)  # whatever socket.setdefaulttimeout said
        yield end
    finally:
        end.detach()  # or the pipe would be closed


def _read(end: socket.socket, length: int) -> bytes:
    """So many bytes. Raises EOFError."""
    content = bytearray(length)
    left = memoryview(content)
    while left:
        count = end.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return bytes(content)
