"""What lies in a run's folder when it begins: a lock, TensorBoard's files."""

import functools
import json
import os
import random
import shutil
import socket
from pathlib import Path
from unittest import mock

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from outputs.events import cut_back, framed, read_events
from tools.torture.targets import Target
from tools.torture.targets.mutation import changed, mutated, odd_value
from training import lock

_UPDATE = 2


def _lock(rng: random.Random) -> bytes:
    holder = {"host": socket.gethostname(), "pid": 1 << 30, "started": "1", "job": ""}
    if rng.random() < 0.3:
        holder["host"] = "elsewhere"
    if rng.random() < 0.4:
        return mutated(rng, [json.dumps(holder).encode()])
    value = changed(rng, holder) if rng.random() < 0.8 else odd_value(rng)
    return json.dumps(value, default=str).encode("utf-8", "surrogatepass")


def _take(content: bytes, folder: Path) -> None:
    folder = folder / "run"
    folder.mkdir(exist_ok=True)
    path = folder / lock.LOCK_FILE
    path.write_bytes(content)
    os.utime(path, (1, 1))  # or a run elsewhere may be at work
    with mock.patch.object(lock, "SETTLING", 0.0):
        held = lock.RunLock(folder)
    try:
        assert lock.holder_of(folder)["pid"] == os.getpid()
    finally:
        held.release()
    assert not path.exists()


@functools.cache
def _events() -> list[bytes]:
    """Event files of four steps, one with a graph and the end of a run."""
    head = framed(Event(file_version="brain.Event:2"))
    steps = [
        framed(Event(step=s, summary=Summary(value=[Summary.Value(tag="a", simple_value=s)])))
        for s in range(4)
    ]
    end = Summary(value=[Summary.Value(tag="final/a", simple_value=1.0)])
    more = [framed(Event(graph_def=b"\x0a\x00")), framed(Event(step=2, summary=end))]
    return [head + b"".join(steps), head + more[0] + b"".join(steps[:3]) + more[1], head]


def _event_file(rng: random.Random) -> bytes:
    return mutated(rng, _events())


def _cut(content: bytes, folder: Path) -> None:
    shutil.rmtree(folder / "tb", ignore_errors=True)
    (folder / "tb").mkdir()
    path = folder / "tb" / "events.out.tfevents.1700000000.host.1.0"
    path.write_bytes(content)
    cut_back(path, _UPDATE)
    if path.exists():
        found = list(read_events(path))
        assert found[-1][0] == path.stat().st_size  # whole records
        assert all(event.step <= _UPDATE for _, event in found)


TARGETS = (
    Target("locks of a run", _lock, _take, share=0.3),
    Target("event files", _event_file, _cut, share=0.5),
)
