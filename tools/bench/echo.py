"""A server that takes in bodies and answers each with the same line: what HTTP alone costs.

The connections are those of tools.serve, so are the answers' size and form.
"""

import socket
import sys

import uvicorn

from tools.serve.asgi import Receive, Scope, Send, as_json, whole_body
from tools.serve.connections import Connections, http_config

LIKELY = {"class": "class 123", "confidence": 0.0012345678901234567}
ANSWER = as_json({"images": [{"file": None, "predictions": [LIKELY]}]})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application."""
    await whole_body(receive)
    await ANSWER.give(send)


def main() -> int:
    """Say where, then serve until a signal comes."""
    config = http_config(echo, Connections(512), backlog=2048)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
    uvicorn.Server(config).run([listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
