"""What the tests of the service share: a server in a thread, requests, images."""

import argparse
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from runs import PATIENCE

from tools.common import trained
from tools.serve import app
from tools.serve.nursery import Nursery
from tools.serve.server import Server
from tools.serve.service import Batching, Limits, Service

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Limits(body=200_000, pixels=100_000, images=3, pending=4, seconds=5.0)


def opened(checkpoint) -> trained.Trained:
    given = argparse.Namespace(model=str(checkpoint), ema=False, device="cpu", plugin=[])
    return trained.open_model(given)


@contextlib.contextmanager
def running(checkpoint, limits=LIMITS, monitor=None, **batching):
    """(service, port) of a server in a thread of this process."""
    service = Service(
        opened(checkpoint),
        "pets",
        Nursery(),
        limits=limits,
        batching=Batching(**batching),
        drift=monitor,
    )
    server = Server(app.build_app(service), service)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield service, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def request(port, method, path, body=None, **headers):
    """(status, headers, JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    kind = answer.headers["content-type"] or ""
    value = json.loads(content) if kind.startswith("application/json") else content.decode()
    return answer.status, answer.headers, value


def predict(port, content, query="", kind="image/png"):
    return request(port, "POST", f"/predict{query}", content, content_type=kind)


def form(files):
    parts = [
        b'--cut\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
        % (name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + b"--cut--\r\n"


def png(width, height, color=(200, 150, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width, height):
    """A PNG whose header alone is large."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def metrics(port):
    """Value of each sample by name and labels."""
    text = request(port, "GET", "/metrics")[2]
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def wait_for(port):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if request(port, "GET", "/health")[0] == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the service did not start")
