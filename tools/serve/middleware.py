"""What every request passes before the application: its body is counted, its time is taken."""

import time
from collections.abc import Container

from tools.serve.asgi import App, Message, Receive, Scope, Send, as_json
from tools.serve.bodies import RequestBody
from tools.serve.service import Service

CLOSE = (b"connection", b"close")
MOST_DIGITS = 20  # of a length
BADLY_FRAMED = as_json(
    {"error": "one Content-Length, or a Transfer-Encoding, must tell where the body ends"},
    400,
    (CLOSE,),
)


class RequestMiddleware:
    """ASGI around the application: bodies are counted as they come, requests are measured.

    Args:
        app: the application.
        service: whose limits hold, and whose metrics tell of the requests.
        paths: those that the metrics name.
    """

    def __init__(self, app: App, service: Service, paths: Container[str]) -> None:
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = _plain(scope)
        path = scope["path"] if scope["path"] in self.paths else "other"
        bodies = self.service.bodies
        limits = self.service.limits
        body = RequestBody(scope, receive, limits.body, bodies, limits.seconds)
        status, start = 500, time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not body.ended:  # the rest of it is no next request
                    message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
            await send(message)

        try:
            if _framed_well(scope):
                await self.app(scope, body.receive, send_and_note)
            else:
                await BADLY_FRAMED.give(send_and_note)
        finally:
            bodies.release(body)
            metrics = self.service.metrics
            metrics.requests.labels(path, status).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - start)


def _plain(scope: Scope) -> Scope:
    """``scope`` with the path of a URL that came in its place; HEAD as GET, the server leaves out
    the answer's body."""
    path = scope["path"]
    if path.lower().startswith(("http://", "https://")):  # RFC 9112, section 3.2.2
        path = "/" + path.split("/", 3)[3] if path.count("/") > 2 else "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "method": method}


def _framed_well(scope: Scope) -> bool:
    """Whether all readers see the request's end at the same place.

    Whoever sends a length and a transfer coding may be smuggling a request (RFC 9112, section 6.1).
    """
    values = {name: value for name, value in scope["headers"]}
    length = values.get(b"content-length", b"0")
    both = b"transfer-encoding" in values and b"content-length" in values
    return not both and length.isdigit() and len(length) <= MOST_DIGITS
