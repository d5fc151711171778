"""Connections of clients: how many, how slow they may be, and how they end.

uvicorn's protocol on h11, and on top of it: whoever is idle makes room for new connections; a
request's head, and a client that takes in its answer, have a limited time; a connection is closed
so that the last answer is read.
"""

import asyncio
import functools
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for a request's head, from the connection or the last answer on
WRITE_SECONDS = 30.0  # for a client that takes in nothing of its answer
LINGER = 2.0  # seconds in which what a client still sends is dropped, once it has its answer
HEAD_BYTES = 32 * 2**10  # of a request's head
PARTING = 1.0  # seconds for the next request of a kept connection when the service ends


class Connections:
    """All that are open.

    Args:
        most: open at a time; of more, the one idle for longest is closed, or the new one refused.
        on_refusal: called with ``"idle"`` or ``"new"`` then.
    """

    def __init__(self, most: int, on_refusal: Callable[[str], None] = lambda how: None) -> None:
        self.most, self.on_refusal = most, on_refusal
        self.ending = False
        self.open: set[Connection] = set()
        # As ordered sets: the one that came first is the first to go.
        self.idle: dict[Connection, None] = {}
        self.parting: dict[Connection, None] = {}

    def admit(self, new: "Connection") -> bool:
        """Take in a connection; False: there are too many."""
        self.open.add(new)
        if len(self.open) <= self.most:
            return True
        first = next(iter(self.parting), None) or next(iter(self.idle), None)
        self.on_refusal("new" if first is None else "idle")
        if first is None:
            return False
        first.abort()
        return True

    def forget(self, connection: "Connection") -> None:
        """It is gone."""
        self.open.discard(connection)
        self.idle.pop(connection, None)
        self.parting.pop(connection, None)


def http_config(app: Any, connections: Connections, *, backlog: int) -> uvicorn.Config:
    """How uvicorn serves the ASGI application ``app`` over ``connections``, HTTP alone.

    ``backlog``: connections that the system keeps until they are accepted.
    """
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, connections),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=backlog,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=int(2 * HEAD_SECONDS),  # ``Connection`` comes before
    )


class _Lingering:
    """A transport whose ``close`` lets the client read what was written last.

    Closed while the client still sends, a connection is reset, and its answer lost.
    """

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self._transport, self._on_close = transport, on_close
        self.lingers = False
        self.ended = False  # the client sends no more

    def close(self) -> None:
        if self.is_closing():
            return
        if self.ended:
            self._transport.close()
            return
        self.lingers = True
        self._on_close()
        try:
            if self._transport.can_write_eof():
                self._transport.write_eof()  # once all is written
        except OSError:  # the client has reset the connection, which asyncio is yet to see
            self._transport.abort()
            return
        self._transport.resume_reading()

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(H11Protocol):
    """One connection; see ``Connections``."""

    transport: Any

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._began = False  # something of the next request has come

    # --- events of asyncio ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(_Lingering(transport, self._part))  # type: ignore[arg-type]
        if self._all.admit(self):
            self._wait_for_head()
        else:
            self.refuse(503, "too many connections are open: try again in a second")

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.forget(self)
        self._set_timer(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._began = True
        super().data_received(data)
        if self.in_hand and not self.transport.is_closing():
            self._set_timer(None)
            self._all.idle.pop(self, None)
            if self._all.ending:
                self._end_after_answer()

    def eof_received(self) -> bool:
        """Whether the connection stays: a client that has sent its request may end its side."""
        if self.transport.is_closing() or not self.in_hand or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self.transport.ended = True
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    # --- events of uvicorn ------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._began = False
        super().on_response_complete()
        if not self.in_hand and not self.transport.is_closing():
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "this is no HTTP request")

    def shutdown(self) -> None:
        """Answer what is in hand, and what a client may be about to ask; then close."""
        if self.in_hand:
            self._end_after_answer()
        elif not self.transport.is_closing():
            self._set_timer(self.loop.call_later(PARTING, self._close_if_idle))

    # --- what is done -----------------------------------------------------------------------------

    @property
    def in_hand(self) -> bool:
        """Whether a request waits for its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def refuse(self, status: int, message: str) -> None:
        """Answer without the application, unless its answer has begun; then close."""
        if self.in_hand:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self.in_hand or not self.cycle.response_started:
            body = json.dumps({"error": message}).encode()
            retry = "retry-after: 1\r\n" if status == 503 else ""
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"{retry}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._all.forget(self)
        self.transport.abort()

    def _wait_for_head(self) -> None:
        self._all.idle.pop(self, None)
        self._all.idle[self] = None
        seconds = PARTING if self._all.ending else HEAD_SECONDS
        self._set_timer(self.loop.call_later(seconds, self._close_if_idle))

    def _close_if_idle(self) -> None:
        if self.in_hand or self.transport.is_closing():
            return
        if self._began:
            self.refuse(408, "the request's head did not come in time")
        else:
            self.transport.close()

    def _end_after_answer(self) -> None:
        self.cycle.keep_alive = False
        if CLOSE_HEADER not in self.cycle.default_headers:
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def _part(self) -> None:
        self._all.idle.pop(self, None)
        self._all.parting[self] = None
        self._set_timer(self.loop.call_later(LINGER, self._end_parting))

    def _end_parting(self) -> None:
        if self.transport.get_write_buffer_size():
            self._set_timer(self.loop.call_later(WRITE_SECONDS, self.abort))
        else:
            self.abort()

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer
