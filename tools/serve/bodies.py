"""The bytes of requests' bodies: how many one may have, and all of them together."""

import asyncio
import math
import time
from contextlib import suppress

from tools.serve import memory
from tools.serve.asgi import Message, Receive, Scope
from tools.serve.images import RefusedError

LEAST_RATE = 8192  # bytes per second that a body must come with,
GRACE = 5.0  # seconds after its first
YOUNG = 1.0  # seconds in which a body isn't cut in favour of another, which waits for as long
TICK = 0.05  # seconds between two looks for room
TRIMMED = 32 * 2**20  # bytes, after whose end memory is given back to the system


class Bodies:
    """What is in hand of all bodies, of requests that have no answer yet.

    Args:
        most: bytes of all of them together.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._coming: set[RequestBody] = set()
        self._peak = 0

    async def take(self, body: "RequestBody", count: int) -> None:
        """Count ``count`` more bytes of ``body``; the slowest ones make room if need be.

        Raises RefusedError (503) where there is no room, nor a moment later.
        """
        self._coming.add(body)
        body.waits_since = time.monotonic()
        while not self._has_room(body, count):
            if time.monotonic() > body.waits_since + YOUNG + TICK:
                raise RefusedError(503, "too many bytes are in hand: try again in a second")
            await asyncio.sleep(TICK)
        body.waits_since = None
        self.held += count
        self._peak = max(self._peak, self.held)
        body.held += count

    def _has_room(self, body: "RequestBody", count: int) -> bool:
        """Whether ``count`` more bytes have room, which others may have made."""
        while self.held + count > self.most:
            now = time.monotonic()
            slow = [b for b in self._coming if b is not body and now - b.began > YOUNG]
            if not slow:
                return False
            slowest = min(slow, key=lambda b: b.rate(now))
            self.release(slowest)
            slowest.cut()
        return True

    def end(self, body: "RequestBody") -> None:
        """``body`` has come: it no longer makes room for others."""
        self._coming.discard(body)

    def release(self, body: "RequestBody") -> None:
        """``body`` is in hand no more."""
        self._coming.discard(body)
        self.held -= body.held
        body.held = 0
        if self._peak - self.held > TRIMMED and not self.held:
            self._peak = 0
            asyncio.get_running_loop().call_later(0.1, memory.give_back)


def too_slow() -> RefusedError:
    """What is told to who sends a body that makes room for others, or takes too long."""
    return RefusedError(408, "the body came too slowly")


class RequestBody:
    """A request's body, counted as it comes.

    Args:
        scope: ASGI's, of a request.
        receive: ASGI's.
        limit: bytes that the body may have.
        bodies: that of all requests.
        seconds: for all of it.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        limit: int,
        bodies: Bodies,
        seconds: float = math.inf,
    ) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        self.limit, self.received, self.held = limit, 0, 0
        self.announced = int(length) if length.isdigit() else 0
        self.ended = not self.announced and b"transfer-encoding" not in headers
        self.began = time.monotonic()
        self.waits_since: float | None = None  # for room, by no fault of its own
        self._receive, self._bodies, self._seconds = receive, bodies, seconds
        self._cut = False
        self._wait: asyncio.Timeout | None = None

    async def receive(self) -> Message:
        """As ASGI's. Raises RefusedError: 413 for a body that is too large, 408 for one that is too
        slow or late, 503 where all together are too large."""
        # What is announced is refused at once; what isn't, when it has come.
        self._check(self.announced)
        message = await self._next()
        count = len(message.get("body", b""))
        self.received += count
        self._check(self.received)
        if self.ended:
            return message
        await self._bodies.take(self, count)
        if self._cut:  # while it waited
            raise too_slow()
        if not message.get("more_body", False):
            self.ended = True
            self._bodies.end(self)
        return message

    def rate(self, now: float) -> float:
        """Bytes per second in which it came."""
        until = now if self.waits_since is None else self.waits_since
        return self.received / max(1e-3, until - self.began)

    def cut(self) -> None:
        """End the wait for more of it: ``receive`` raises RefusedError (408)."""
        self._cut = True
        if self._wait is not None:
            with suppress(RuntimeError):  # it has just ended
                self._wait.reschedule(0)

    def _check(self, count: int) -> None:
        if count > self.limit:
            raise RefusedError(413, f"the body is larger than {self.limit:,} bytes")

    async def _next(self) -> Message:
        if self.ended:  # the application waits for the client to go away
            return await self._receive()
        due = self.began + min(self._seconds, GRACE + self.received / LEAST_RATE)
        try:
            async with asyncio.timeout(
                0 if self._cut else max(0.0, due - time.monotonic())
            ) as wait:
                self._wait = wait
                return await self._receive()
        except TimeoutError:
            raise too_slow() from None
        finally:
            self._wait = None
