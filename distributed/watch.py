"""How a process learns that another one has failed, is gone, frozen or stuck.

Two threads beside the main one. The first talks to the store through which the processes met: it
writes a sign of life, reads those of others and looks for a failure that was reported. A store call
may never return, since the store lives in a process that may freeze. So the second thread talks to
nobody: it counts for how long the first one has been silent, and ends this process.

Silence is counted in looks of this process, not by the clock: a job that is suspended as a whole
doesn't count meanwhile, and goes on when it is woken.
"""

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from distributed.liveness import process_runs, process_stopped
from distributed.processes import Processes
from errors import PeerError, UserError, first_line, first_names

POLL = 0.5  # seconds between two looks
GRACE = 3.0  # seconds that a process has to notice by itself that another one is gone
WARN = 60.0  # seconds of silence that are worth a warning
_FEWEST = 6  # looks: a busy machine lets a process wait for so long
_GONE = 8  # looks without a sign of life of a process that isn't there any more
WATCHED = 8  # processes whose signs of life one process looks for
FAILED = "watch/failed"
_SHOWN = 4  # processes in a message
_DEPTH = 40  # frames that are compared
_ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
_GO_ON = "--resume auto goes on from the last checkpoint"


class Peer(NamedTuple):
    """A process of the run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def here(self) -> bool:
        """Whether it is one of this machine."""
        return self.host == socket.gethostname()


class Meeting(NamedTuple):
    """What the processes have met at."""

    store: dist.Store
    peers: list[Peer]
    """All processes, in the order of their ranks; each has written a first sign of life."""
    home: int | str
    """Where the store is: the number of a process, or in words."""


class Watch:
    """Looks after the other processes while this one trains.

    Args:
        meeting: of all processes.
        processes: where this one stands.
        timeout: seconds of silence after which a process is given up.

    Attributes:
        cuda: whether the main thread waits for exchanges wherever it waits for the device.
    """

    def __init__(self, meeting: Meeting, processes: Processes, timeout: float) -> None:
        self.store = meeting.store
        self.processes = processes
        self.peers = meeting.peers
        self.timeout = timeout
        self.cuda = False
        self._home = meeting.home
        self._limit = max(_FEWEST, math.ceil(timeout / POLL))
        self._warn = min(self._limit // 2, math.ceil(WARN / POLL))
        # Hundreds of processes ask one store: less often where a timeout leaves time for it.
        self._every = max(1, min(10, self._limit // 100))
        self._warned: set[int | str] = set()
        world = processes.world_size
        following = [(processes.rank + step) % world for step in range(1, world)]
        self._silent = dict.fromkeys(following[:WATCHED], 0)  # looks without a sign of life
        self._beats: dict[int, bytes] = {}
        self._rounds = 0
        self._exchanges = 0
        self._stuck = 0  # looks at which the main thread was where it was before
        self._place = ""
        self._failure: dict[str, Any] | None = None
        self._main = threading.get_ident()  # the one that trains
        self._stopped = threading.Event()
        for work in (self._talk, self._look):
            threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    # --- what the main thread asks for ------------------------------------------------------------

    def exchange(self, value: Any) -> list[Any]:
        """``value`` (of what JSON can hold) of every rank; to be called by all.

        Raises PeerError if another process fails meanwhile.
        """
        self._exchanges += 1
        keys = [f"exchange/{self._exchanges}/{peer.rank}" for peer in self.peers]
        self.store.set(keys[self.processes.rank], json.dumps(value))
        while not self.store.check(keys):
            if self._failure is not None:
                raise PeerError(self._failure["line"], self._failure["code"])
            time.sleep(0.01)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def explain(self, error: Exception) -> Exception:
        """What to raise for ``error``: itself, which the other processes then learn of, or the
        failure of another process that caused it."""
        if isinstance(error, PeerError):
            self.stop()
            self._let_others_read()
            return error
        if isinstance(error, UserError) or not _is_lost_contact(error):
            self._report(error)
            return error
        deadline = time.monotonic() + GRACE
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.stop()
        failure = self._failure
        if failure is None or failure.get("vague"):
            gone = [peer for peer in self.peers if peer.here and not process_runs(peer.pid)]
            names = first_line(error)
            if gone:
                ranks = first_names([peer.rank for peer in gone])
                names = f"process {ranks} is gone (pid {first_names([p.pid for p in gone])})"
            line = f"lost contact: {names}; killed, out of memory, or cut off? {_GO_ON}"
            failure = {"line": line, "code": 1}
        else:
            self._let_others_read()
        return PeerError(failure["line"], failure["code"])

    def tell(self, line: str, code: int, absent: Collection[int | str] = ()) -> None:
        """Let the other processes leave with ``line`` and exit code ``code``, all but the ranks of
        ``absent``, who can't."""
        self.stop()
        failure = json.dumps({"line": line, "code": code})

        def write() -> None:
            with contextlib.suppress(RuntimeError):
                self.store.compare_set(FAILED, "", failure)
                self.store.set(_left(self.processes.rank), "")
                self._let_others_read(absent)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(GRACE + 1.0)

    def _let_others_read(self, absent: Collection[int | str] = ()) -> None:
        """Where the store may live in this process, wait until the others know of the failure."""
        deadline = time.monotonic() + GRACE
        waited_for = [peer for peer in self.peers if peer.rank not in absent]
        with contextlib.suppress(RuntimeError):
            while self.processes.is_main and waited_for and time.monotonic() < deadline:
                waited_for = [
                    peer
                    for peer in waited_for
                    if not self.store.check([_left(peer.rank)])
                    and not (peer.here and not process_runs(peer.pid))
                ]
                time.sleep(0.02)

    def _report(self, error: Exception) -> None:
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, UserError) else 1
        self.tell(f"process {self.processes.rank} failed: {line}", code)

    # --- the thread that talks --------------------------------------------------------------------

    def _talk(self) -> None:
        number = 0
        while not self._stopped.is_set() and self._failure is None:
            number += 1
            try:
                self._one_round(number)
            except Exception as error:
                if self._stopped.is_set():
                    return
                if "timed out" not in str(error).lower():
                    self._failure = self._store_gone()
            self._stopped.wait(POLL)

    def _one_round(self, number: int) -> None:
        """Look for a failure; now and then write a sign of life and look for those of others."""
        if self.store.check([FAILED]):
            self._failure = json.loads(self.store.get(FAILED))
            self.store.set(_left(self.processes.rank), "")
        elif number % self._every == 0:
            beat = json.dumps([number, self._stuck, self._place])
            self.store.set(_beat(self.processes.rank), beat)
            ranks = list(self._silent)
            beats = self.store.multi_get([_beat(rank) for rank in ranks])
            for rank, beat in zip(ranks, beats, strict=True):
                seen = beat != self._beats.get(rank)
                self._silent[rank] = 0 if seen else self._silent[rank] + self._every
                self._beats[rank] = beat
            if self._stuck >= self._limit:
                self._end_standstill()
        self._rounds += 1

    def _store_gone(self) -> dict[str, Any]:
        line = f"lost contact with {self._name(self._home)}: it is gone. {_GO_ON}"
        return {"line": line, "code": 1, "vague": True}

    def _end_standstill(self) -> None:
        """Report a failure if no main thread has moved for so long and some wait for others."""
        texts = self.store.multi_get([_beat(peer.rank) for peer in self.peers])
        beats = [json.loads(text) for text in texts]
        slack = min(max(4, 2 * self._every, self._limit // 10), self._limit // 2)
        places = [f"{peer} {place}" for peer, (_, _, place) in zip(self.peers, beats, strict=True)]
        waiting = [place.startswith(_EXCHANGE) for _, _, place in beats]
        if min(stuck for _, stuck, _ in beats) < self._limit - slack or not any(waiting):
            return
        guilty = [place for place, waits in zip(places, waiting, strict=True) if not waits]
        shown = guilty or places
        line = f"no process got on for {self.timeout:g} s (--dist-timeout): "
        line += f"{'; '.join(shown[:_SHOWN])}{'; …' if len(shown) > _SHOWN else ''}"
        line += f"{', the others wait for it' if guilty else ''}. {_GO_ON}"
        self.store.compare_set(FAILED, "", json.dumps({"line": line, "code": 1}))

    # --- the thread that looks --------------------------------------------------------------------

    def _look(self) -> None:
        rounds, silent = 0, 0
        stack: list[Any] = []
        while not self._stopped.wait(POLL):
            silent = 0 if self._rounds != rounds else silent + 1
            rounds = self._rounds
            before, stack = stack, self._main_stack()
            self._stuck = self._stuck + 1 if stack == before else 0
            if self._failure is not None:
                self._leave(self._failure)
                return
            looks = {**self._silent, self._home: silent} if silent else self._silent
            self._warn_of(looks)
            lost = [
                who
                for who, count in looks.items()
                if count >= self._limit or (count >= _GONE and self._is_gone(who))
            ]
            if not lost:
                continue
            failure = self._silence(lost[0])
            if not silent:
                self.tell(failure["line"], failure["code"], absent=lost)
            self._exit(failure)

    def _leave(self, failure: dict[str, Any]) -> None:
        """Leave, unless the main thread does so by itself."""
        if not self._stopped.wait(GRACE):
            # It waits in an exchange that will not end.
            self._exit(failure)

    def _exit(self, failure: dict[str, Any]) -> None:
        print(f"error: {failure['line']}", file=sys.stderr, flush=True)
        os._exit(failure["code"])

    def _silence(self, who: int | str) -> dict[str, Any]:
        """The failure that a process, or where the store is, gives no sign of life."""
        if self._is_gone(who):
            line = f"lost contact: {self._name(who)} is gone; killed, or out of memory?"
            return {"line": f"{line} {_GO_ON}", "code": 1}
        why = self._why(who) or "frozen, or its machine?"
        line = f"{self._name(who)} has given no sign of life for {self.timeout:g} s"
        return {"line": f"{line} (--dist-timeout): {why} {_GO_ON}", "code": 1}

    def _is_gone(self, who: int | str) -> bool:
        """Whether ``who`` is a process of this machine that has ended.

        Of one that still gives signs of life, from a container with numbers of its own, it says
        nothing.
        """
        peer = None if isinstance(who, str) else self.peers[who]
        return peer is not None and peer.here and not process_runs(peer.pid)

    def _warn_of(self, looks: Mapping[int | str, int]) -> None:
        """Say once of whom there has been no sign for a while; of many who wait, one says it."""
        late = {who for who, count in looks.items() if count >= self._warn}
        me, world = self.processes.rank, self.processes.world_size
        for who in late - self._warned:
            if isinstance(who, str) or who == (me + 1) % world or me == (who + 1) % world:
                print(
                    f"warning: {self._name(who)} has given no sign of life for "
                    f"{self._warn * POLL:g} s: {self._why(who) or 'busy, frozen or cut off?'} "
                    f"After {self.timeout:g} s the run ends",
                    file=sys.stderr,
                    flush=True,
                )
        self._warned = late

    def _why(self, who: int | str) -> str:
        """What the system of this machine knows of it."""
        here = [peer for peer in self.peers if peer.here and who in (peer.rank, FILE)]
        stopped = next((peer for peer in here if process_stopped(peer.pid)), None)
        if stopped is None:
            return ""
        name = "it" if who == stopped.rank else str(stopped)
        return f"{name} is stopped (kill -CONT {stopped.pid} wakes it)."

    def _name(self, who: int | str) -> str:
        return who if isinstance(who, str) else str(self.peers[who])

    def _main_stack(self) -> list[tuple[Any, int]]:
        """Where the main thread is; ``_place`` says it in words."""
        frame = sys._current_frames().get(self._main)
        frames = []
        while frame is not None and len(frames) < _DEPTH:
            frames.append(frame)
            frame = frame.f_back
        self._place = _in_words(frames, self.cuda) if frames else ""
        return [(frame.f_code, frame.f_lasti) for frame in frames]


_EXCHANGE = "waits for an exchange"
FILE = "the file where the processes met"
LAUNCHER = "the launcher, where the processes met"


def first_beat(store: dist.Store, rank: int) -> None:
    """Write the first sign of life, before others look for it."""
    store.set(_beat(rank), json.dumps([0, 0, ""]))


def _left(rank: int) -> str:
    """The key of a process that knows of the failure and doesn't need the store any more."""
    return f"watch/left/{rank}"


def _beat(rank: int) -> str:
    return f"watch/beat/{rank}"


def _in_words(frames: list[Any], cuda: bool) -> str:
    """Where a thread is, innermost frame first: its line of this project, and what it does."""
    ours = [frame for frame in frames if _is_ours(frame.f_code.co_filename)]
    place = ""
    if ours:
        name = ours[0].f_code.co_filename.removeprefix(_ROOT)
        place = f" at {name}:{ours[0].f_lineno} ({ours[0].f_code.co_name})"
    exchange = any(
        f"torch{os.sep}distributed" in frame.f_code.co_filename
        or frame.f_code.co_name == "_engine_run_backward"
        for frame in frames
    )
    exchange |= cuda and bool(ours) and frames[0] is ours[0]
    return f"{_EXCHANGE if exchange else 'is'}{place}"


def _is_ours(file: str) -> bool:
    return file.startswith(_ROOT) and "site-packages" not in file


def _is_lost_contact(error: Exception) -> bool:
    """Whether ``error`` comes from an exchange with a process that is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
