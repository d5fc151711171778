"""The server around the application: where it listens, its limits, how it ends."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from tools.serve.connections import Connections, http_config
from tools.serve.service import Service

DRAIN = 30.0  # seconds that requests in hand get when the service is told to end
CLOSING = 2.0  # seconds that processes and threads get once nobody waits for them
QUEUE = 2048  # connections that the system keeps until they are accepted
AT_ONCE = 32  # connections accepted between two looks at anything else
FILES = 64  # that the service itself may come to need
_SO_ATTACH_FILTER = 26  # of asm-generic/socket.h

log = logging.getLogger(__name__)


def most_connections(asked: int) -> int:
    """How many of ``asked`` connections this process has files for; its limit is raised first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return asked
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 32
    return max(1, min(asked, soft - used - FILES - AT_ONCE))


class Server(uvicorn.Server):
    """uvicorn's server with bounds on connections, and an end that resets none.

    Args:
        app: the ASGI application.
        service: whose limits hold. It is closed when the server ends.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self.service = service
        self.ended_well = True
        metrics = service.metrics
        self.connections = Connections(
            most_connections(service.limits.connections),
            lambda how: metrics.refused_connections.labels(how).inc(),
        )
        metrics.connections.set_function(lambda: len(self.connections.open))
        super().__init__(http_config(app, self.connections, backlog=AT_ONCE))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        for listener in sockets or ():
            # Connections inherit it. asyncio sees to it where it has made the socket itself: with
            # the system's default an answer, which is written in two pieces, waits for 40 ms.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)  # asyncio accepts as many at once as it lets wait

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer every connection that the system has taken, refuse later ones, end the service."""
        log.info("ending: what is in hand is answered, for %.0f s at most", DRAIN)
        until = time.monotonic() + DRAIN
        self.service.ending = self.connections.ending = True
        await self._stop_listening(sockets or (), until)
        for connection in list(self.connections.open):
            connection.shutdown()
        while self.connections.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.connections.open:
            self.ended_well = False
            log.error("%d connections were cut", len(self.connections.open))
            for connection in list(self.connections.open):
                connection.refuse(503, "the service has ended")
        if not await asyncio.to_thread(self.service.close, CLOSING):
            self.ended_well = False
            log.error("the model or a decoder is stuck, and was left behind")

    async def _stop_listening(self, listeners: Sequence[socket.socket], until: float) -> None:
        for listener in listeners:
            _take_no_more(listener)
        # What the system has taken by now, asyncio accepts: later where no file is left for it.
        while listeners and time.monotonic() < until and select.select(listeners, [], [], 0)[0]:
            await asyncio.sleep(0)
        # A connection that was accepted belongs to its server, which must not be closed until then,
        # one turn of the loop later.
        await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        for listener in listeners:
            listener.close()
        await asyncio.sleep(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: end, the second time at once."""
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


def _take_no_more(listener: socket.socket) -> None:
    """Have the system ignore who comes: clients try again, and are refused once it is closed.

    Those that came between the last look and ``close`` would be reset. A filter that lets no packet
    through (Linux, socket(7), SO_ATTACH_FILTER): one instruction, "return 0".
    """
    if sys.platform != "linux":
        return
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def serve(app: Any, service: Service, listener: socket.socket) -> NoReturn:
    """Serve until a signal comes, then end this process: with 1 where something was cut or stuck.

    Nothing is left to do then, and Python's own end would wait for threads that are stuck.
    """
    server = Server(app, service)
    # uvicorn sends itself the signal again that ended it: being told to end is no failure.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    # What is there now stays. To look for garbage in it takes 0.2 s, in which nobody is answered.
    gc.freeze()
    server.run([listener])
    logging.shutdown()
    os._exit(0 if server.ended_well else 1)
