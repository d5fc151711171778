"""The process that decoders are forked from: it has loaded what each of them needs, and no more.

It is forked from the service before that has a model and threads, so it costs neither time nor
memory of its own. It ends with the service, also with one that is killed, and its children with it.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import struct
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import NoReturn, Self

from pipeline.workers import die_with_parent
from tools.serve import decoder

REQUEST = struct.Struct("<i")  # the process to end, or FORK, which comes with a descriptor
REPLY = struct.Struct("<ii")  # errno or 0; the process that was forked, or an exit code
FORK = 0
MOST_FILES = 1 << 16  # descriptors that the service may have open

log = logging.getLogger(__name__)


class Nursery:
    """Forks decoders, and ends them. To be made while the process has no other threads: what they
    hold at that moment is held for ever in a process that is forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[int] = set()
        self._closed = False
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fork(self, theirs: int) -> int:
        """The process id of a new decoder, which talks over the descriptor ``theirs``."""
        with self._lock:
            try:
                child = self._ask(FORK, [theirs])
            except ConnectionError:
                if self._closed:
                    raise
                # Killed from outside, and all decoders with it.
                log.warning("the process that decoders are forked from is gone: it is replaced")
                self._end()
                self._start()
                child = self._ask(FORK, [theirs])
            self._children.add(child)
        return child

    def kill(self, child: int) -> None:
        """End a decoder, whatever it is at; its exit code stays for ``end``."""
        if child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def end(self, child: int) -> int | None:
        """Kill a decoder if it runs; returns the exit code that it had, as far as that is known."""
        with self._lock:
            if child not in self._children:
                return None
            try:
                code = self._ask(child)
            except ConnectionError:
                return None
            self._children.discard(child)
            return code

    def close(self) -> None:
        """End the process and all decoders, if they haven't been ended yet."""
        self._closed = True
        self._kill()  # without the lock: who holds it may wait for an answer
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # Python warns of any other thread: those of OpenBLAS end before a fork, by themselves.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if not self._process:
            _main(theirs)
        theirs.close()

    def _kill(self) -> None:
        if process := self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _end(self) -> None:
        self._control.close()
        self._kill()
        if self._process:
            # Decoders end with it, and are left to this process where it is a container's first.
            for process in (self._process, *self._children):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process, 0)
        self._process = 0
        self._children.clear()

    def _ask(self, request: int, handles: list[int] | None = None) -> int:
        socket.send_fds(self._control, [REQUEST.pack(request)], handles or [])
        reply = self._control.recv(REPLY.size)
        if len(reply) < REPLY.size:
            raise ConnectionResetError
        error, value = REPLY.unpack(reply)
        if error:
            raise OSError(error, os.strerror(error))
        return value


def _main(control: socket.socket) -> NoReturn:
    """What the process does until the service is gone."""
    try:
        _set_up(control.fileno())
        while True:
            data, handles, *_ = socket.recv_fds(control, REQUEST.size, 1)
            if not data:
                break
            (request,) = REQUEST.unpack(data)
            try:
                value = _fork(control, handles[0]) if request == FORK else _ended(request)
                reply = REPLY.pack(0, value)
            except OSError as error:
                reply = REPLY.pack(error.errno or 1, 0)
            control.sendall(reply)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _set_up(control: int) -> None:
    die_with_parent()
    # Whoever stops a service may send SIGTERM to all its processes: this one and its children then
    # go on until the service has ended, as images are still being decoded.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it gets no exit codes
    # Connections of clients, where it is forked once more: whoever closes one must be its last.
    os.closerange(3, control)
    os.closerange(control + 1, MOST_FILES)
    gc.freeze()  # of what is shared nothing is freed, and no file closed twice


def _fork(control: socket.socket, handle: int) -> int:
    """A decoder on the descriptor ``handle``; returns its process id. Raises OSError."""
    try:
        child = os.fork()
    except OSError:
        os.close(handle)
        raise
    if child:
        os.close(handle)
        return child
    try:
        die_with_parent()
        control.close()
        decoder.run(Connection(handle))
    finally:
        os._exit(0)


def _ended(child: int) -> int:
    """The exit code of a decoder, which is killed if it runs. Raises OSError."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
