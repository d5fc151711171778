"""Ask a service as many clients do, and count: ``python -m tools.serve.load URL IMAGES``.

Light, so that it leaves the cores to the service: plain sockets, the standard library alone. The
figures go to standard output as JSON.
"""

import argparse
import asyncio
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Tally:
    """What came of the requests."""

    answered: int = 0
    """Good requests answered with 200."""
    failed: Counter[str] = field(default_factory=Counter)
    """Good requests that were not, by status or error."""
    refused: Counter[str] = field(default_factory=Counter)
    """Malformed requests, by status or error."""
    seconds: list[float] = field(default_factory=list)
    """Of each good request."""


def requests_of(folder: Path, host: str) -> list[bytes]:
    """A request for each JPEG file of ``folder``."""
    contents = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    if not contents:
        raise SystemExit(f"{folder} has no *.jpg")
    return [_request(host, content) for content in contents]


def malformed_requests(good: Sequence[bytes], host: str) -> list[bytes]:
    """Requests that deserve a 4xx: no image, half an image, nothing, another type, no form."""
    half = good[0].partition(b"\r\n\r\n")[2]
    return [
        _request(host, b"this is no image"),
        _request(host, half[: len(half) // 2]),
        _request(host, b""),
        _request(host, b"{}", "application/json"),
        _request(host, b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        _request(host, half, path="/predict?topk=none"),
    ]


def _request(
    host: str, content: bytes, kind: str = "image/jpeg", path: str = "/predict?topk=1"
) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def _client(
    number: int,
    address: tuple[str, int],
    good: Sequence[bytes],
    bad: Sequence[bytes],
    every: int,
    until: float,
    tally: Tally,
) -> None:
    turn, connection = number, None
    while time.monotonic() < until:
        turn += 1
        malformed = every > 0 and turn % every == 0
        request = bad[turn // every % len(bad)] if malformed else good[turn % len(good)]
        start = time.monotonic()
        try:
            connection = connection or await asyncio.open_connection(*address)
            status, keeps = await asyncio.wait_for(_ask(*connection, request), 60)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            status, keeps = type(error).__name__, False
        if malformed:
            tally.refused[status] += 1
        elif status == "200":
            tally.answered += 1
            tally.seconds.append(time.monotonic() - start)
        else:
            tally.failed[status] += 1
        if connection and not keeps:
            connection[1].close()
            connection = None
    if connection:
        connection[1].close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[str, bool]:
    """Status, and whether the connection may be used again."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    await reader.readexactly(int(headers["content-length"]))
    return lines[0].split()[1], headers.get("connection") != "close"


async def measure(
    url: str, folder: Path, *, clients: int, seconds: float, every: int
) -> dict[str, object]:
    """Keep ``clients`` asking for ``seconds``; each ``every``-th request is malformed (0: none)."""
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    good = requests_of(folder, parts.netloc)
    bad, tally = malformed_requests(good, parts.netloc), Tally()
    used, start = _cpu(), time.monotonic()
    await asyncio.gather(
        *(
            _client(number, address, good, bad, every, start + seconds, tally)
            for number in range(clients)
        )
    )
    took = time.monotonic() - start
    ordered = sorted(tally.seconds) or [0.0]
    return {
        "clients": clients,
        "seconds": took,
        "answered": tally.answered,
        "images_per_second": tally.answered / took,
        "failed": dict(tally.failed),
        "refused": dict(tally.refused),
        "median_seconds": ordered[len(ordered) // 2],
        "p99_seconds": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "client_cores": (_cpu() - used) / took,
    }


def _cpu() -> float:
    """Seconds of a core that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a good request failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.serve.load", description=__doc__)
    parser.add_argument("url", help="http://127.0.0.1:8000")
    parser.add_argument("images", type=Path, help="folder of JPEG files")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--malformed-every", type=int, default=0)
    given = parser.parse_args(argv)
    figures = asyncio.run(
        measure(
            given.url,
            given.images,
            clients=given.clients,
            seconds=given.seconds,
            every=given.malformed_every,
        )
    )
    json.dump(figures, sys.stdout, indent=1)
    print()
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
