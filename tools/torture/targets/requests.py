"""Requests to the HTTP service: the bytes of a connection, and forms."""

import asyncio
import contextlib
import functools
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import uvicorn
from uvicorn.server import ServerState

from augmentation.protocol import RGB
from tools.serve import app
from tools.serve.batcher import Answer
from tools.serve.bodies import Bodies
from tools.serve.connections import HEAD_BYTES, Connection, Connections
from tools.serve.decoders import Content
from tools.serve.forms import files_of
from tools.serve.images import RefusedError
from tools.serve.metrics import Metrics
from tools.serve.service import Limits, Service
from tools.torture import hostile
from tools.torture.targets import Target
from tools.torture.targets.mutation import mutated

_NAMES = ["cat", "dog", "\udcff"]
_IMAGE = hostile.png(9, 9)
_SEEDS = [sent[:20_000] for sent, *_ in hostile.requests(_IMAGE).values()]
_SEEDS += [b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in (b"/", b"/metrics", b"/live")]
_KIND = "multipart/form-data; boundary=cut"
_FORMS = [sent.partition(b"\r\n\r\n")[2] for sent in _SEEDS if _KIND.encode() in sent]


class _Service(Service):
    """Answers as one with a model does, without one."""

    def __init__(self) -> None:
        self.name, self.limits = "cats", Limits(body=50_000, images=3, seconds=5.0)
        transform = SimpleNamespace(form=RGB)
        self.classifier: Any = SimpleNamespace(class_names=_NAMES, transform=transform)
        self.thresholds = None
        self.metrics = Metrics(["cat", "dog", "other"], None)
        self.bodies = Bodies(100_000)
        self.pending, self.ending = 0, False

    async def answer(self, content: Content, until: float) -> Answer:
        if bytes(content) != _IMAGE:
            raise RefusedError(422, "not the image")
        return Answer(np.array([0.5, 0.3, 0.2], np.float32), torch.zeros(3, 1, 1))

    async def explain(self, answer: Answer, class_index: int | None) -> str:
        return "data:"

    def stuck(self) -> str | None:
        return None


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = bytearray(), False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = pause_reading = resume_reading = write_eof = close

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


class _Errors(logging.Handler):
    """Keeps the exceptions that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))


@functools.cache
def _server() -> tuple[asyncio.AbstractEventLoop, uvicorn.Config, _Errors]:
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    config = uvicorn.Config(
        app.build_app(_Service()),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    config.load()
    return asyncio.new_event_loop(), config, errors


def _requests(rng: random.Random) -> bytes:
    sent = b"".join(rng.choice(_SEEDS) for _ in range(rng.choice((1, 1, 2, 3))))
    return sent if rng.random() < 0.05 else mutated(rng, [sent])


def _converse(sent: bytes, folder: Path) -> None:
    """Never an answer of 500, and nothing in the log."""
    loop, config, errors = _server()
    errors.found.clear()
    written = loop.run_until_complete(_conversation(config, sent))
    assert not errors.found, errors.found[0]
    assert b"HTTP/1.1 500" not in written, written[:300]
    assert not written or written.startswith(b"HTTP/1.1 "), written[:100]


async def _conversation(config: uvicorn.Config, sent: bytes) -> bytes:
    state, transport = ServerState(), _Transport()
    connection = Connection(Connections(10), config=config, server_state=state, app_state={})
    connection.connection_made(transport)
    pieces = random.Random(len(sent))
    while sent and not transport.closed:
        count = pieces.choice((1, 20, 1000, len(sent)))
        connection.data_received(sent[:count])
        sent = sent[count:]
        for _ in range(3):
            await asyncio.sleep(0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.002):  # an answer that is only waiting for the loop
            await asyncio.gather(*map(asyncio.shield, state.tasks), return_exceptions=True)
    connection.connection_lost(None)
    await asyncio.wait_for(asyncio.gather(*state.tasks, return_exceptions=True), 20)
    return bytes(transport.written)


def _forms(rng: random.Random) -> bytes:
    return mutated(rng, _FORMS)


def _read_form(body: bytes, folder: Path) -> None:
    for name, content in files_of(body, _KIND, 8):
        assert bytes(content) in body and isinstance(name, str)


TARGETS = [
    Target("requests of clients", _requests, _converse, share=0.2),
    Target("forms of clients", _forms, _read_form, ours=(RefusedError,)),
]
