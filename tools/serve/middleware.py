"""What every request passes before the application: its body is counted, its time is taken."""

import asyncio
import time
from contextlib import suppress

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.serve.service import Service

PATHS = ("/", "/predict", "/health", "/metrics", "/docs", "/openapi.json")
LINGER = 1.0  # seconds in which the rest of a refused body is read and dropped


class RequestMiddleware:
    """ASGI around the application: bodies are counted as they come, requests are measured."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        body = RequestBody(scope, receive, self.service.limits.body)
        status, start = 500, time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await body.drop_rest()
            await send(message)

        try:
            await self.app(scope, body.receive, send_and_note)
        finally:
            metrics = self.service.metrics
            metrics.requests.labels(path, status).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - start)


class RequestBody:
    """A request's body, counted as it comes."""

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        headers = dict(scope["headers"])
        self.limit, self.received = limit, 0
        self.announced = int(headers.get(b"content-length", 0))
        self.ended = not self.announced and b"transfer-encoding" not in headers
        self._receive = receive

    async def receive(self) -> Message:
        """As ASGI's. Raises HTTPException (413) for a body that is too large."""
        message = await self._next()
        # What is announced is refused at once; what isn't, when it has come.
        if max(self.announced, self.received) > self.limit:
            raise HTTPException(413, f"the body is larger than {self.limit:,} bytes")
        return message

    async def drop_rest(self) -> None:
        """Read what is left, for a moment: a client that is still sending hears no answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while not self.ended:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message
