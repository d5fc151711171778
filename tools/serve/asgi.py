"""What an ASGI application is given and gives back, as far as the service needs it."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]


class ClientGoneError(Exception):
    """The client has ended the connection before its request, or its answer, was done."""


@dataclass(frozen=True)
class Response:
    """A whole answer."""

    body: bytes
    kind: bytes
    """Its Content-Type."""
    status: int = 200
    headers: Headers = ()
    """Further ones."""

    async def give(self, send: Send) -> None:
        """Send it."""
        length = b"%d" % len(self.body)
        headers = [(b"content-type", self.kind), (b"content-length", length), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def as_json(content: Any, status: int = 200, headers: Headers = ()) -> Response:
    """``content`` as JSON in ASCII: names of classes may hold what UTF-8 can't say."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("ascii"), b"application/json", status, headers)


async def whole_body(receive: Receive) -> bytearray:
    """A request's body. Raises ClientGoneError."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body
