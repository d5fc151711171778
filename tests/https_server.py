"""Servers on this machine: one that sends any bytes, plain or by https."""

import contextlib
import socketserver
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

Answer = bytes | Callable[[IO[bytes]], None]


@dataclass
class Served:
    """``answers``: by path, the bytes of a whole answer, or what writes them; others are 404.
    ``asked``: how often each path was."""

    address: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: Counter = field(default_factory=Counter)


def content(body: bytes, *headers: str) -> bytes:
    """An answer with ``body``."""
    lines = ("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(place: str) -> bytes:
    """An answer that sends on to ``place``."""
    return f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()


@contextlib.contextmanager
def serving(certificate: tuple[Path, Path] | None = None) -> Iterator[Served]:
    """A server until the block ends, by https with a key and ``certificate``."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client may leave at any moment
                path = self.rfile.readline().split()[1].decode()
                while self.rfile.readline().strip():
                    pass
                served.asked[path] += 1
                missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
                answer = served.answers.get(path, missing)
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                else:
                    answer(self.wfile)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

        def get_request(self):
            connection, address = super().get_request()
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            return connection, address

        def handle_error(self, *_):
            pass

    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate[1], certificate[0])
    with Server(("127.0.0.1", 0), Handler) as server:
        scheme, host = ("http", "127.0.0.1") if context is None else ("https", "localhost")
        served = Served(f"{scheme}://{host}:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def trusted_certificate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A key and a certificate of "localhost" in ``folder``, which this process trusts."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-keyout", key, "-out", certificate]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return key, certificate
