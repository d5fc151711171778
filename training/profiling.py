"""``--profile N``: where the time of N updates goes, as a trace and as a table."""

import contextlib
import gzip
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from outputs.files import Outputs, check_writable
from utils import written_whole

log = logging.getLogger(__name__)

WARM_UP = 5  # updates of an epoch before the trace: the first of them do what is done only once
ROWS = 12  # of the table


class Profiler:
    """Traces some updates of one epoch of a session; training is the same to the last bit.

    The trace ends with the epoch at the latest. It is of the first epoch that is long enough, or
    else of the last one.

    Args:
        updates: how many; 0 makes a profiler that does nothing.
        folder: for the trace, ``update-N.pt.trace.json.gz``, as TensorBoard names them.
        device: of the training.
        outputs: those of the run; the trace is written through them.
    """

    def __init__(self, updates: int, folder: Path, device: torch.device, outputs: Outputs) -> None:
        self._left = updates
        self._folder, self._device, self._outputs = folder, device, outputs
        self._profile: profile | None = None
        self._update = 0  # that the trace begins behind
        self._to_come = 0  # updates of the epoch

    @contextlib.contextmanager
    def epoch(self, update: int, left: int, *, last: bool) -> Iterator[None]:
        """Inside, an epoch is trained that begins at ``update`` and has ``left`` updates to come.

        ``last``: no other one follows in this session.
        """
        enough = left >= self._left + WARM_UP
        if not self._left or left <= 0 or not (enough or last):
            yield
            return
        before = min(WARM_UP, max(0, left - self._left))
        self._update, self._to_come = update + before, left
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracer reports its every step
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # CUDA's own profiler needs an update to get ready.
        ready = min(1, before)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            steps = schedule(wait=before - ready, warmup=ready, active=self._left, repeat=1)
        self._profile = profile(
            activities=activities, schedule=steps, on_trace_ready=self._write, acc_events=True
        )
        self._profile.start()
        try:
            yield
        finally:
            self._stop()

    def step(self) -> None:
        """Called after each update."""
        if self._profile is None:
            return
        self._to_come -= 1
        if self._to_come:
            self._profile.step()
        if not (self._to_come and self._left):
            self._stop()

    def _stop(self) -> None:
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.stop()  # a trace that is shorter than was asked for is written here

    def _write(self, traced: profile) -> None:
        self._left = 0
        path = self._folder / f"update-{self._update}.pt.trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _export(traced, path)
            log.info("profile  %s: open it at https://ui.perfetto.dev", path)
        except OSError as error:
            # torch gives a trace away once: it can't be tried again.
            self._outputs.failed(path, error, "the trace is lost, training goes on")
        for line in table(traced):
            log.info("profile  %s", line)


def _export(traced: profile, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(plain))
        _check_whole(plain)
        with (
            written_whole(path) as temporary,
            open(plain, "rb") as source,
            gzip.open(temporary, "wb", compresslevel=6) as target,
        ):
            shutil.copyfileobj(source, target)


def _check_whole(trace: Path) -> None:
    """Raise OSError where torch, which says nothing of it, could not write all of a trace."""
    end = b""
    with contextlib.suppress(FileNotFoundError), open(trace, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16))
        end = file.read().rstrip()
    if not end.endswith(b"}"):
        check_writable(trace.parent)
        raise OSError("torch could not write all of it, as where a disk is full")


def table(traced: profile) -> list[str]:
    """The operations that take the most time by themselves, on the device where it has been traced,
    one a line."""
    events = [e for e in traced.key_averages() if not e.key.startswith("ProfilerStep")]
    on_device = any(e.self_device_time_total for e in events)
    seconds = {
        event.key: (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        for event in events
    }
    counts = {event.key: event.count for event in events}
    whole = sum(seconds.values()) or 1.0
    dearest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:ROWS]
    lines = [f"{'device' if on_device else 'CPU'} time  share   calls  operation"]
    for key in dearest:
        time, share = 1000 * seconds[key], seconds[key] / whole
        lines.append(f"{time:8.1f} ms {share:6.1%} {counts[key]:7d}  {key[:60]}")
    return lines
