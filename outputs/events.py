"""TensorBoard's files: nothing is lost while they can't be written, nothing comes twice."""

import contextlib
import itertools
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from outputs.files import Outputs

log = logging.getLogger(__name__)

FLUSH_SECONDS = 20.0
# Held in memory while they can't be written; what comes after that is left out.
MOST_BYTES = 1 << 28
# Checksums of the data are compared in so many last bytes of a file: 8 MB take a second, and what
# a crash damages is the end.
CHECKED_BYTES = 1 << 23
_NUMBERS = itertools.count()  # of this process's files
# Host, process and number, as torch names them: other programs end theirs in .v2 and more.
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..*\.\d+\.\d+")
_AT_END = ("final/", "_hparams_/")  # tags of what is written at the end of a run


class EventWriter(SummaryWriter):
    """torch's writer of scalars, images, … with a file that may fail.

    torch's own writes from a thread that the first error ends, and every later call raises it.

    The files of earlier sessions are cut to what the checkpoint knows that this one goes on from,
    as ``log.txt`` is; readers other than TensorBoard's don't know of steps that are to be hidden.

    Args:
        folder: for the event file.
        outputs: the run's.
        update: updates done; 0 is a run that starts anew, and of earlier files nothing stays.
        again: how tags begin that come again for this very update, since the checkpoint was written
            before them.

    Attributes:
        has_graph: whether an earlier file has the model's graph.
    """

    def __init__(
        self, folder: Path, outputs: Outputs, update: int = 0, again: tuple[str, ...] = ()
    ) -> None:
        self.has_graph = False
        self._sink = _Sink(folder, outputs)
        own = self._sink.event_writer.path

        def cut_earlier(folder: Path) -> None:
            earlier = [path for path in event_files(folder) if path.name < own.name]
            self.has_graph |= any([cut_back(path, update, again) for path in earlier])

        outputs.write(folder, cut_earlier)
        # A TensorBoard that is open has read what was cut off: it hides steps from this one on.
        super().__init__(str(folder), purge_step=update + 1 if update else None)

    def _get_file_writer(self) -> FileWriter:
        self.file_writer = self._sink
        self.all_writers = {self._sink.get_logdir(): self._sink}
        step, self.purge_step = self.purge_step, None
        if step is not None:
            self._sink.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
        return self._sink

    def add_final(
        self, options: Mapping[str, Any], metrics: Mapping[str, float], update: int
    ) -> None:
        """The options of a run beside its final metrics, for HPARAMS."""
        # SummaryWriter.add_hparams opens another file, with a thread of its own.
        for summary in hparams(options, metrics):
            self._sink.add_summary(summary, update)
        for name, value in metrics.items():
            self.add_scalar(name, value, update)


class _Sink(FileWriter):
    """What ``SummaryWriter`` hands its events to."""

    def __init__(self, folder: Path, outputs: Outputs) -> None:
        self.event_writer = _EventFile(folder, outputs)


class _EventFile:
    """One event file. Its records are held until they are on disk; a half one is cut off again."""

    def __init__(self, folder: Path, outputs: Outputs) -> None:
        own = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        # TensorBoard reads a folder's files in the order of their names, which begin with the time.
        # The clock may have gone back since the last one was made.
        number = int(time.time())
        with contextlib.suppress(OSError):
            for path in event_files(folder)[-1:]:
                number = max(number, int(_NAME.fullmatch(path.name)[1]) + 1)
        self.path = folder / f"events.out.tfevents.{number:010d}.{own}"
        self._outputs = outputs
        self._written = 0  # bytes on disk
        head = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._head = framed(head)
        self._pending = [self._head]
        self._size = 0  # bytes pending
        self._flushed_at = 0.0
        self.flush()

    def get_logdir(self) -> str:
        return str(self.path.parent)

    def add_event(self, event: Event) -> None:
        record = framed(event)
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
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._written)
                raise
            self._written = file.tell()
        self._pending, self._size = [], 0


def framed(event: Event) -> bytes:
    """The record of an event: length, its checksum, the event, its checksum."""
    parts: list[bytes] = []

    class _Parts:
        write = staticmethod(parts.append)

    RecordWriter(_Parts()).write(event.SerializeToString())
    return b"".join(parts)


# --- earlier sessions ---------------------------------------------------------------------------


def event_files(folder: Path) -> list[Path]:
    """The event files in ``folder``, in the order of their names. Raises OSError."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if _NAME.fullmatch(p.name) and p.is_file())


def read_events(path: Path) -> Iterator[tuple[int, Event]]:
    """The events of a file, each with the place where its record ends, up to one that isn't whole.

    Raises OSError.
    """
    with open(path, "rb") as file:
        size, place = os.fstat(file.fileno()).st_size, 0
        while len(head := file.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            end = place + 12 + length + 4
            if int.from_bytes(head[8:], "little") != masked_crc32c(head[:8]):
                return
            if end > size or length > MOST_BYTES:
                return
            data, checksum = file.read(length), int.from_bytes(file.read(4), "little")
            if end > size - CHECKED_BYTES and checksum != masked_crc32c(data):
                return
            try:
                event = Event.FromString(data)
            except DecodeError:
                return
            place = end
            yield end, event


def cut_back(path: Path, update: int, again: tuple[str, ...] = ()) -> bool:
    """Cut off from an event file what comes after ``update``; all of it, if that is 0.

    So go tags that begin with one of ``again`` at this update, what a run writes at its end, and
    a record that isn't whole, with what is behind it. Returns whether a graph is left. Raises
    OSError.
    """
    end, events, graph = 0, 0, False
    for behind, event in read_events(path) if update else ():
        if event.HasField("session_log"):
            continue  # its step is what the session before was cut to
        beginnings = (*_AT_END, *again) if event.step == update else _AT_END
        if event.step > update or any(v.tag.startswith(beginnings) for v in event.summary.value):
            break
        end = behind
        events += not event.HasField("file_version")
        graph |= event.HasField("graph_def")
    if not events:
        path.unlink()
    elif end < path.stat().st_size:
        os.truncate(path, end)
    return graph
