"""Names from files, and what servers say: listings of shards, answers, redirects; descriptions."""

import csv
import io
import json
import random
import socket
from pathlib import Path
from typing import Any
from unittest import mock

from architectures.hub import built_by, unasked
from config import DataOptions
from download import fetch, is_internal
from errors import first_names, printable
from models import build_model
from outputs.names import chart_label, csv_cell, from_csv_cell
from pipeline.dataset import build_dataset
from tools.torture.targets import Target
from tools.torture.targets.mutation import changed, mutated, odd_text

_LISTING = {
    "splits": {"train": {"filenames": ["train-0.tar", "a/train-1.tar"], "dataset_lengths": [3, 4]}},
    "classes": ["cat", "dog"],
}
_ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest\r\n\r\n",
    b"HTTP/1.1 301 Moved\r\nLocation: //[::1]:80/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 307 Moved\r\nLocation: ../b?c#d\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Encoding: gzip\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\n" + bytes(range(256)),
]
_DESCRIPTION = {
    "architecture": "test_vit",
    "model_args": {"depth": 1, "img_size": 32},
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5]},
}
_ODD = "\x1b\x9b\x07\b\r\n\t\u202e\u2066\u200d\u2028\ud800\udcff'=+-@$\\`<&"


def _listing(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutated(rng, [json.dumps(_LISTING).encode()])
    return json.dumps(changed(rng, _LISTING), default=str).encode()


def _read_listing(content: bytes, folder: Path) -> None:
    far = folder / "far"
    far.mkdir(exist_ok=True)
    (far / "_info.json").write_bytes(content)
    options = DataOptions(
        data_set="wds/x", data_path=f"file://{far}", shard_cache=str(folder / "near")
    )
    try:
        # There are no shards: a listing that is one ends in DataError, too.
        with mock.patch("time.sleep"):
            build_dataset(True, options, seed=0)
    finally:
        others = {path.name for path in folder.iterdir()} - {"far", "near"}
        assert not others, f"written outside of the cache: {others}"


def _text(rng: random.Random) -> str:
    parts = (odd_text(rng)[:9] if rng.random() < 0.5 else rng.choice(_ODD) for _ in range(6))
    return "".join(list(parts)[: rng.randrange(7)])


def _show(text: str, _: Path) -> None:
    for shown in (printable(text), first_names([text, text]), chart_label(text)):
        assert not set(shown) & set("\x1b\x9b\x07\b\r\n\t\u202e\u2066\u2028"), ascii(shown)
        shown.encode("utf-8")
    file = io.StringIO()
    csv.writer(file).writerow((csv_cell(text), ""))
    [[cell, _]] = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert from_csv_cell(cell) == text


def _answers(rng: random.Random) -> list[bytes]:
    """What is answered, one connection after the other."""
    return [mutated(rng, _ANSWERS) for _ in range(rng.randrange(1, 4))]


class _Connection:
    """In the place of a socket: the next of the answers, from wherever it leads."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self._connected = 0

    def connect(self, place: tuple[str, int]) -> None:
        self._connected += 1
        assert self._connected == 1 or not is_internal(place[0]), f"connected to {place}"
        number = min(self._connected, len(self._answers)) - 1
        self._left = io.BytesIO(self._answers[number])

    def recv_into(self, buffer: memoryview) -> int:
        return self._left.readinto(buffer)

    def nothing(self, *_: object) -> None: ...

    settimeout = setsockopt = sendall = close = nothing


def _look_up(host: str, port: int | None, **_: object) -> list[tuple[Any, ...]]:
    """Addresses are themselves, and names lead into the internet."""
    try:
        is_internal(host)
    except ValueError:
        host = "8.8.8.8"
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]


def _fetch(answers: list[bytes], folder: Path) -> None:
    connection = _Connection(answers)
    with (
        mock.patch.dict("os.environ", {"no_proxy": "*"}),
        mock.patch("socket.getaddrinfo", _look_up),
        mock.patch("socket.socket", lambda *_: connection),
    ):
        fetch("http://example.org/file", folder / "file")


def _description(rng: random.Random) -> Any:
    return changed(rng, _DESCRIPTION)


def _build(description: Any, _: Path) -> None:
    if not isinstance(description, dict):  # which checkpointing/form.py refuses
        return
    with built_by("hf-hub:a/b", description), unasked(["hf-hub:a/b"]):
        build_model("hf-hub:a/b", 3, input_size=32)


TARGETS = (
    Target("listing of remote shards", _listing, _read_listing, share=0.2),
    Target("names that are shown", _text, _show),
    Target("answers of servers", _answers, _fetch, ours=(OSError,)),
    Target("descriptions of hub models", _description, _build, share=0.05),
)
