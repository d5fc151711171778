"""How the processes of a run find each other, through a store that all of them reach."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist

from config import DistOptions
from distributed.environment import number
from distributed.processes import Processes
from distributed.watch import FAILED, FILE, GRACE, LAUNCHER, Meeting, Peer, first_beat
from errors import OptionError, PeerError, first_line, first_names, os_error_text, printable

Result = TypeVar("Result")


def meet(options: DistOptions, processes: Processes) -> Meeting:
    """Wait until all processes have come.

    Raises:
        OptionError: the options or the environment say no place to meet at, or not all came.
        PeerError: another process says so.
    """
    url = options.dist_url
    where = url
    if url == "env://":
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    home: int | str = 0
    if url.startswith("file://"):
        home = FILE
    elif _of_launcher(url):
        home = LAUNCHER
    try:
        store, peers = _in_time(
            lambda: _come_together(options, processes, where),
            options.dist_start_timeout + GRACE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            reason = "the port is in use"
        raise OptionError(
            "dist_url",
            f"process {processes.rank} of {processes.world_size} can't meet the others at {where}: "
            f"{reason}. Choose a free port (MASTER_PORT, or torchrun --standalone), and check the "
            "address",
        ) from None
    return Meeting(store, peers, home)


def _in_time(work: Callable[[], Result], seconds: float) -> Result:
    """What ``work`` returns or raises. Raises TimeoutError where it takes too long.

    Something else that listens there, or a frozen process, would leave it waiting for ever.
    """
    done: list[Result] = []
    failed: list[Exception] = []

    def note() -> None:
        try:
            done.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError("what listens there doesn't answer: another program, or a frozen one?")
    return done[0]


def _come_together(
    options: DistOptions, processes: Processes, where: str
) -> tuple[dist.Store, list[Peer]]:
    rank, world, seconds = processes.rank, processes.world_size, options.dist_start_timeout
    store = _open_store(options, processes)
    if _of_launcher(options.dist_url):
        # It outlives the processes that the launcher starts anew, each rank once: after a failure,
        # and with the same count of restarts when a machine comes or goes.
        attempt = f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world}"
        store = dist.PrefixStore(f"{attempt}/{store.add(f'{attempt}/{rank}', 1)}", store)
    own = [socket.gethostname(), os.getpid(), world]
    if store.add(f"number/{rank}", 1) > 1:
        other = ""
        if store.check([f"here/{rank}"]):
            host, pid, _ = json.loads(store.get(f"here/{rank}"))
            other = f", this one and pid {pid} on host {host}"
        raise OptionError(
            "dist_url",
            f"two processes at {where} have RANK {rank}{other}: does another run meet there? Then "
            "choose another place",
        )
    first_beat(store, rank)
    store.set(f"here/{rank}", json.dumps(own))
    deadline = time.monotonic() + seconds
    while missing := [r for r in range(world) if not store.check([f"here/{r}"])]:
        if store.check([FAILED]):
            failure = json.loads(store.get(FAILED))
            raise PeerError(failure["line"], failure["code"])
        if time.monotonic() > deadline:
            raise OptionError(
                "world_size",
                f"of {world} processes number {first_names(missing, 8)} did not come to {where} "
                f"within {seconds} s: is WORLD_SIZE right, did they fail? Or raise "
                "--dist-start-timeout",
            )
        time.sleep(0.05)
    found = [json.loads(text) for text in store.multi_get([f"here/{r}" for r in range(world)])]
    peers = [Peer(r, host, pid) for r, (host, pid, _) in enumerate(found)]
    for peer, (_, _, theirs) in zip(peers, found, strict=True):
        if theirs != world:
            line = f"--world-size: {peer} is one of {theirs} processes, rank {rank} one of {world}"
            line += ": set the same WORLD_SIZE everywhere"
            store.compare_set(FAILED, "", json.dumps({"line": line, "code": 2}))
            time.sleep(1.0)  # the store may end with this process
            raise PeerError(line, 2)
    return store, peers


# --- stores ---------------------------------------------------------------------------------------


def _of_launcher(url: str) -> bool:
    return url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(options: DistOptions, processes: Processes) -> dist.Store:
    url, timeout = options.dist_url, timedelta(seconds=options.dist_start_timeout)
    if url.startswith("file://"):
        path = Path(urlsplit(url).path)
        try:
            hold_meeting_file(path)
        except OSError as error:
            raise OptionError("dist_url", os_error_text(error, path)) from None
        return dist.FileStore(str(path), processes.world_size)
    host, port = address(url)
    if _of_launcher(url):
        meeting = dist.rendezvous(url, processes.rank, processes.world_size, timeout=timeout)
        return next(iter(meeting))[0]
    return dist.TCPStore(
        host,
        port,
        processes.world_size,
        processes.is_main,
        timeout,
        wait_for_workers=False,
    )


def address(url: str) -> tuple[str, int]:
    """Host and port of a ``--dist-url`` env:// or tcp://HOST:PORT. Raises OptionError."""
    if url == "env://":
        missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n, "").strip()]
        if missing:
            raise OptionError(
                "dist_url",
                f"{' and '.join(missing)} not set: start with torchrun, set them, or name a place "
                "with --dist-url tcp://HOST:PORT",
            )
        return os.environ["MASTER_ADDR"], number("MASTER_PORT", low=1, high=65535)
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass  # brackets that don't close, a port that isn't one
    raise OptionError(
        "dist_url", f"{printable(url)!r} is neither env://, file://PATH nor tcp://HOST:PORT"
    )


_held: list[int] = []  # descriptors of the locks beside meeting files; they end with the process


def hold_meeting_file(path: Path) -> None:
    """Hold the file that processes meet at; remove it first if nobody else holds it.

    A run that was killed leaves its file behind, with all that was said in it. Whoever meets holds
    a shared lock on a file beside it, which the system lets go when the process ends, however it
    does. Whoever can have that lock alone knows that the meeting is over.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    handle = os.open(path.with_name(f"{path.name}.lock"), flags, 0o666)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    # Between the two locks another one may come and remove it too: nothing is in it yet.
    fcntl.flock(handle, fcntl.LOCK_SH)
    _held.append(handle)
