"""tools.serve against requests that are odd, malformed or hostile, over real sockets."""

import contextlib
import json
import re
import socket

import pytest
from serving import png, request

from tools.torture import hostile

REQUESTS = hostile.requests(png(9, 9))


def answer_to(port, sent):
    """(status, headers in lower case, body, whether the connection was closed)."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):  # it may be refused before all is sent
            client.sendall(sent)
        received = b""
        while b"\r\n\r\n" not in received or received.startswith(b"HTTP/1.1 100"):
            piece = client.recv(65536)
            assert piece, "closed without an answer"
            received = re.sub(rb"^HTTP/1.1 100 .*?\r\n\r\n", b"", received + piece, flags=re.S)
        head, _, body = received.partition(b"\r\n\r\n")
        head = head.decode("latin-1").lower()
        length = (
            0 if sent.startswith(b"HEAD") else int(re.search(r"content-length: (\d+)", head)[1])
        )
        while len(body) < length:
            body += client.recv(65536)
        client.settimeout(0.05 if "connection: close" not in head else 5)
        try:
            closed = client.recv(1) == b""
        except TimeoutError:
            closed = False
        return int(head.split()[1]), head, body[:length], closed


@pytest.mark.parametrize("name", REQUESTS)
def test_each_is_answered_with_what_it_deserves(port, caplog, name):
    sent, wanted, closes = REQUESTS[name]
    status, head, body, closed = answer_to(port, sent)
    assert (status, closed or not closes) == (wanted, True)
    if status >= 400:
        told = json.loads(body)
        assert set(told) - {"images"} == {"error"} and len(told["error"]) < 500
        assert told["error"].isprintable()
    assert not [r for r in caplog.records if r.exc_info]
    assert request(port, "GET", "/health")[0] == 200
