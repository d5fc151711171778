"""Hostile clients of the service, each a coroutine that goes on until it is cancelled."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tools.torture import hostile

MANY = 1000  # connections of a flood
BODY = 16 * 2**20  # bytes, the service's default limit


@dataclass
class Target:
    """The service, and what is sent to it."""

    host: str
    port: int
    decoders: Callable[[], list[int]]
    """The numbers of its decoding processes."""
    rng: random.Random


Attack = Callable[[Target], Awaitable[None]]


async def _session(target: Target, *pieces: bytes, pause: float = 0.0, reads: bool = True) -> None:
    """Send ``pieces``, ``pause`` seconds apart, and read until the service closes."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        if not reads:
            await asyncio.sleep(1e6)
        while await reader.read(65536):
            pass
    finally:
        writer.transport.abort()


async def _forever(client: Callable[[], Awaitable[None]]) -> None:
    while True:
        with contextlib.suppress(OSError):
            await client()
        await asyncio.sleep(0.01)


async def _crowd(count: int, client: Callable[[], Awaitable[None]]) -> None:
    """``count`` clients at a time, each of which comes again when it is done."""
    await asyncio.gather(*(_forever(client) for _ in range(count)))


async def idle(target: Target) -> None:
    """Connections that say nothing."""
    await _crowd(MANY, lambda: _session(target))


async def slow_heads(target: Target) -> None:
    """Heads that come byte by byte."""
    head = hostile.HEAD + b"X-A: " + b"a" * 2000
    pieces = [bytes([value]) for value in head]
    await _crowd(MANY, lambda: _session(target, *pieces, pause=1.0))


async def slow_bodies(target: Target) -> None:
    """Bodies that come byte by byte."""
    head = hostile.HEAD + hostile.IMAGE + b"Content-Length: 100000\r\n\r\n"
    await _crowd(300, lambda: _session(target, head, *[b"x"] * 1000, pause=0.5))


async def stalled_bodies(target: Target) -> None:
    """Bodies as large as they may be, but for the last byte."""
    head = hostile.HEAD + hostile.IMAGE + b"Content-Length: %d\r\n\r\n" % BODY
    await _crowd(120, lambda: _session(target, head, bytes(BODY - 1)))


async def endless_bodies(target: Target) -> None:
    """Chunks without an end."""
    head = hostile.HEAD + hostile.IMAGE + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    await _crowd(50, lambda: _session(target, head, *[chunk] * 1000))


async def large_bodies(target: Target) -> None:
    """Whole bodies as large as they may be, which are no images."""
    await _crowd(60, lambda: _session(target, hostile.request(bytes(BODY))))


async def pipelined(target: Target) -> None:
    """Thousands of requests at once, whose answers nobody reads."""
    many = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 5000
    await _crowd(50, lambda: _session(target, many, reads=False))


async def resets(target: Target) -> None:
    """Clients that reset the connection while they are answered."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.write(hostile.request(hostile.png(200, 200)))
        await asyncio.sleep(target.rng.random() / 20)
        writer.transport.abort()

    await _crowd(50, client)


async def malformed(target: Target) -> None:
    """All odd and malformed requests, in turns."""
    turns = itertools.cycle([sent for sent, *_ in hostile.requests(hostile.png(20, 20)).values()])

    async def client() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await _session(target, next(turns))

    await _crowd(30, client)


async def garbage(target: Target) -> None:
    """Random bytes, and requests with random bytes in them."""
    good = hostile.request(hostile.png(9, 9))

    async def client() -> None:
        rng = target.rng
        sent = bytearray(good if rng.random() < 0.8 else rng.randbytes(500))
        for _ in range(rng.randrange(1, 20)):
            sent[rng.randrange(len(sent))] = rng.randrange(256)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await _session(target, bytes(sent))

    await _crowd(50, client)


def prepare() -> None:
    """Make what takes long to make, so that attacks begin at once."""
    _scans()
    _large()
    _slow()


def _scans() -> bytes:
    return hostile.request(hostile.many_scans(6000, 3000))


def _large() -> list[bytes]:
    return [hostile.request(hostile.noisy(4000)), hostile.request(hostile.bomb(7000, 7000))]


def _slow() -> bytes:
    return hostile.request(hostile.noisy(2500))


async def thousands_of_scans(target: Target) -> None:
    """Progressive JPEG files that would take hours."""
    sent = _scans()
    await _crowd(8, lambda: _session(target, sent))


async def large_images(target: Target) -> None:
    """Images within all limits that take as long, and as much memory, as they may."""
    turns = itertools.cycle(_large())
    await _crowd(8, lambda: _session(target, next(turns)))


async def frozen_decoders(target: Target) -> None:
    """Decoding processes that stop in the middle of an image, as by storage that hangs."""
    sent = _slow()

    async def freeze() -> None:
        await asyncio.sleep(1.0)
        for pid in target.decoders()[:2]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    await asyncio.gather(_crowd(3, lambda: _session(target, sent)), _forever(freeze))


async def killed_decoders(target: Target) -> None:
    """Decoding processes that are killed, as by the system for their memory."""

    async def kill() -> None:
        await asyncio.sleep(0.5)
        for pid in target.decoders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    await _forever(kill)


async def explanations(target: Target) -> None:
    """Explanations, which take the time of several answers."""
    sent = hostile.request(hostile.png(300, 300), path=b"/predict?explain=true")
    await _crowd(50, lambda: _session(target, sent.replace(b"Host", b"Connection: close\r\nHost")))


# Attacks from inside, which hit the honest image too where its decoder is the one that is hit.
AT_RANDOM = (frozen_decoders, killed_decoders)
ATTACKS: dict[str, Attack] = {
    "1,000 idle connections": idle,
    "1,000 heads at 1 byte/s": slow_heads,
    "300 bodies at 2 bytes/s": slow_bodies,
    "120 stalled bodies of 16 MiB": stalled_bodies,
    "50 endless chunked bodies": endless_bodies,
    "60 × whole bodies of 16 MiB": large_bodies,
    "50 × 5,000 pipelined requests, unread": pipelined,
    "50 × reset while answered": resets,
    "30 × malformed requests": malformed,
    "50 × garbage": garbage,
    "8 × thousands of scans": thousands_of_scans,
    "8 × images at the limit": large_images,
    "decoders frozen each second": frozen_decoders,
    "decoders killed twice a second": killed_decoders,
    "50 × explanations": explanations,
}
