"""What one process of a machine has made and the others take over, in memory that all share."""

import os
import pickle
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from mmap import ACCESS_COPY, mmap
from typing import NamedTuple, TypeVar

from distributed.processes import Processes, barrier, gather, main_process_first

Value = TypeVar("Value")

_ALIGNED = 64  # bytes: arrays begin at multiples of it
_TOKEN = 16  # bytes


def once_per_machine(
    processes: Processes,
    make: Callable[[], Value],
    place: Sequence[str],
    *,
    shareable: Callable[[Value], bool] = lambda value: True,
) -> Value:
    """What ``make`` returns, made by one process for all of its machine; to be called by all.

    The main process makes it first and alone (it may download), then one on each other machine.
    The arrays in it lie once in the memory of the machine: a process that writes to one gets a
    copy of what it changes. Where it can't be taken over, each process makes its own.

    Args:
        processes: where this one stands.
        make: exchanges nothing with other processes.
        place: what ``make`` goes by that may differ between processes; those with the same one
            on the same host share.
        shareable: whether the value keeps what it is when it is pickled.
    """
    if not processes.distributed:
        return make()
    mine = [socket.gethostname(), *place]
    everyone = gather(mine)
    maker, alone = everyone.index(mine), everyone.count(mine) == 1
    value, offer = None, None
    with main_process_first(processes):
        if maker == processes.rank:
            value = make()
            offer = None if alone or not shareable(value) else _offered(value)
    offers = gather(offer)
    taken = None if offers[maker] is None else _taken_over(offers[maker])
    if taken is not None:
        value = taken[0]
    elif maker != processes.rank:
        value = make()
    barrier()
    if offer is not None:  # all that wanted it have mapped it
        os.close(offer.descriptor)
    return value


class _Offer(NamedTuple):
    """Where another process of this machine finds a value."""

    pid: int
    descriptor: int
    token: bytes
    """At the beginning of the file: another container may have processes of the same number."""


def _offered(value: object) -> _Offer | None:
    """The value in a file without a name, in memory; None where it can't be pickled or kept there.

    The file holds the token, the number of buffers, the length of each, and the buffers; the first
    one is the pickled value, the others are its arrays (PEP 574).
    """
    if not hasattr(os, "memfd_create"):
        return None
    arrays: list[pickle.PickleBuffer] = []
    try:
        content = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
        descriptor = os.memfd_create("shared", os.MFD_CLOEXEC)
    except Exception:  # what a plug-in's classes raise, or the system
        return None
    buffers = [memoryview(content), *(array.raw() for array in arrays)]
    token = secrets.token_bytes(_TOKEN)
    lengths = [len(buffer) for buffer in buffers]
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(token + struct.pack(f"<{len(lengths) + 1}q", len(lengths), *lengths))
            for buffer in buffers:
                file.seek(-file.tell() % _ALIGNED, os.SEEK_CUR)
                file.write(buffer)
            file.truncate(max(file.tell(), 1))
    except OSError:  # no memory
        os.close(descriptor)
        return None
    return _Offer(os.getpid(), descriptor, token)


def _taken_over(offer: _Offer) -> tuple[object] | None:
    """The value of an offer; None where it can't be had here."""
    try:
        with open(f"/proc/{offer.pid}/fd/{offer.descriptor}", "rb") as file:
            view = memoryview(mmap(file.fileno(), 0, access=ACCESS_COPY))
        if view[:_TOKEN] != offer.token:
            return None
        (count,) = struct.unpack_from("<q", view, _TOKEN)
        place = _TOKEN + 8
        lengths = struct.unpack_from(f"<{count}q", view, place)
        place += 8 * count
        buffers = []
        for length in lengths:
            place += -place % _ALIGNED
            buffers.append(view[place : place + length])
            place += length
        return (pickle.loads(buffers[0], buffers=buffers[1:]),)
    except Exception:  # another container's process; a plug-in that isn't known here
        return None
