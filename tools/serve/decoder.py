"""What a decoding process does: images one at a time, within bounds of its own."""

import os
import resource
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from tools.serve import memory
from tools.serve.images import RefusedError

Decode = Callable[[bytes], Tensor]


class Task(NamedTuple):
    """What a process is for; it must be possible to pickle it."""

    decode: Decode
    """A file's bytes to (3, H, W); it may raise RefusedError."""
    most_memory: int
    """Bytes of address space beyond what the process begins with; what needs more fails with
    MemoryError."""


HEAD = struct.Struct("<4id")  # of a reply: status, the shape of a tensor, seconds of CPU time
DECODED = 200
MOST_TEXT = 8192  # characters of a reply in words
KEPT = 64 * 2**20  # bytes of freed memory that a process keeps for the next image
NICENESS = 10  # below the service: what is decoded is answered before more is decoded


def run(connection: Connection) -> None:
    """Answer what comes over ``connection`` until that ends; the main function of a process.

    The first message is a ``Task``, each later one an image file. The reply is ``HEAD``, then the
    float32 values of a tensor or, with a status other than ``DECODED``, a text: why there is none.
    """
    try:
        decode, most_memory = connection.recv()
    except (EOFError, OSError):
        return
    _set_up(most_memory)
    usual = memory.resident()
    while True:
        try:
            head, data = _reply(decode, connection.recv_bytes())
            connection.send_bytes(head)
            connection.send_bytes(data)
        except (EOFError, OSError):
            return
        del data
        if memory.resident() > usual + KEPT:
            memory.give_back()


def _set_up(most_memory: int) -> None:
    most = memory.address_space() + most_memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Libraries write a line about each oddity of a file: strangers would fill the log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.nice(NICENESS)


def _reply(decode: Decode, content: bytes) -> tuple[bytes, bytes | memoryview]:
    try:
        began = time.process_time()
        tensor = decode(content)
        head = HEAD.pack(DECODED, *tensor.shape, time.process_time() - began)
        return head, memoryview(tensor.contiguous().numpy()).cast("B")
    except RefusedError as error:
        status, text = error.status, error.message
    except MemoryError:
        status, text = 422, "the image needs more memory than one may take"
    except Exception:
        status, text = 500, traceback.format_exc()
    return HEAD.pack(status, 0, 0, 0, 0.0), text[-MOST_TEXT:].encode(errors="replace")
