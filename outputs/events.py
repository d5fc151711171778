"""TensorBoard's files, of which nothing is lost while they can't be written."""

import itertools
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from outputs.files import Outputs

log = logging.getLogger(__name__)

FLUSH_SECONDS = 20.0
# Held in memory while they can't be written; what comes after that is left out.
MOST_BYTES = 1 << 28
_NUMBERS = itertools.count()  # of this process's files


class EventWriter(SummaryWriter):
    """torch's writer of scalars, images, … with a file that may fail.

    torch's own writes from a thread that the first error ends, and every later call raises it.

    Args:
        folder: for the event file.
        outputs: the run's.
        purge_step: steps from this one on, of earlier files in the folder, are hidden.
    """

    def __init__(self, folder: Path, outputs: Outputs, purge_step: int | None = None) -> None:
        self._sink = _Sink(folder, outputs)
        super().__init__(str(folder), purge_step=purge_step)

    def _get_file_writer(self) -> FileWriter:
        self.file_writer = self._sink
        self.all_writers = {self._sink.get_logdir(): self._sink}
        step, self.purge_step = self.purge_step, None
        if step is not None:
            self._sink.add_event(Event(file_version="brain.Event:2"), step)
            self._sink.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
        return self._sink

    def add_final(self, options: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The options of a run beside its final metrics, for HPARAMS."""
        # SummaryWriter.add_hparams opens another file, with a thread of its own.
        for summary in hparams(options, metrics):
            self._sink.add_summary(summary)
        for name, value in metrics.items():
            self.add_scalar(name, value)


class _Sink(FileWriter):
    """What ``SummaryWriter`` hands its events to."""

    def __init__(self, folder: Path, outputs: Outputs) -> None:
        self.event_writer = _EventFile(folder, outputs)


class _EventFile:
    """One event file. Its records are held until they are on disk; a half one is cut off again."""

    def __init__(self, folder: Path, outputs: Outputs) -> None:
        own = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        # TensorBoard reads a folder's files in the order of their names.
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{own}"
        self._outputs = outputs
        self._written = 0  # bytes on disk
        head = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._head = _record(head.SerializeToString())
        self._pending = [self._head]
        self._size = 0  # bytes pending
        self._flushed_at = 0.0
        self.flush()

    def get_logdir(self) -> str:
        return str(self.path.parent)

    def add_event(self, event: Event) -> None:
        record = _record(event.SerializeToString())
        if self._size < MOST_BYTES:
            self._pending.append(record)
            self._size += len(record)
            if self._size >= MOST_BYTES:
                log.warning("%s: what comes is left out until it can be written", self.path)
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed_at = time.monotonic()
        if self._pending:
            self._outputs.write(self.path, self._write)

    def close(self) -> None:
        self.flush()

    def _write(self, path: Path) -> None:
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size < self._written:  # the folder was removed
                self._pending.insert(0, self._head)
                self._written = 0
            file.truncate(self._written)
            data = memoryview(b"".join(self._pending))
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(self._written)
                raise
            self._written = file.tell()
        self._pending, self._size = [], 0


def _record(data: bytes) -> bytes:
    """``data`` framed by its length and checksums."""
    parts: list[bytes] = []

    class _Parts:
        write = staticmethod(parts.append)

    RecordWriter(_Parts()).write(data)
    return b"".join(parts)
