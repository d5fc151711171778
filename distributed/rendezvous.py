"""How the processes of a run find each other, and how all of them learn that one has failed."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from config import DistOptions
from distributed.liveness import process_runs
from distributed.processes import Processes, barrier
from errors import OptionError, PeerError, Stopped, UserError, first_line, first_names
from utils import pick_device

POLL = 0.5  # seconds between looks for the failure of another process
GRACE = 5.0  # seconds that a process has to notice by itself that another one is gone
_FAILED = "failed"


@contextlib.contextmanager
def joined(options: DistOptions, device_name: str) -> Iterator[Processes]:
    """This process among those that torchrun, SLURM or ``--dist-url`` started, if any.

    NCCL carries CUDA tensors and gloo those of the host; on a CPU all is gloo. When a process
    leaves the block with an error, the others leave with a PeerError that names it, also out of an
    exchange that would have waited for it.

    Raises:
        OptionError: the processes can't meet, or not all of them came.
        PeerError: another process failed.
    """
    processes = _launched(options)
    if not processes.distributed:
        yield processes
        return
    store = _meet(options, processes)
    cuda = pick_device(device_name, processes.local_rank).type == "cuda"
    watch = _Watch(store, processes)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=processes.rank,
            world_size=processes.world_size,
            timeout=timedelta(seconds=options.dist_timeout),
        )
        yield processes
        watch.stop()
        barrier()
    except KeyboardInterrupt:
        watch.stop()
        raise
    except Stopped as stopped:
        watch.tell(f"process {processes.rank} was {stopped}", stopped.exit_code)
        raise
    except Exception as error:
        raise watch.explain(error) from None
    finally:
        watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _launched(options: DistOptions) -> Processes:
    """This process as the launcher's environment describes it."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = _number("RANK"), _number("WORLD_SIZE")
        local_rank = int(env.get("LOCAL_RANK", 0))
        local_world = int(env.get("LOCAL_WORLD_SIZE", 1))
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        rank, world = _number("SLURM_PROCID"), _number("SLURM_NTASKS")
        local_rank = int(env.get("SLURM_LOCALID", 0))
        local_world = world // int(env.get("SLURM_NNODES", 1))
        env.setdefault("MASTER_PORT", "29500")
        if options.dist_url == "env://" and "MASTER_ADDR" not in env:
            raise OptionError(
                "dist_url",
                "SLURM started several tasks but MASTER_ADDR is not set: export it, "
                "use --dist-url tcp://HOST:PORT, or launch with run_with_submitit.py",
            )
    else:
        if options.distributed or options.world_size > 1:
            raise OptionError(
                "distributed",
                "no launcher started this process (RANK and WORLD_SIZE are not set): start "
                "with torchrun --nproc-per-node N main.py …",
            )
        return Processes()
    if options.world_size not in (1, world):
        raise OptionError(
            "world_size", f"{options.world_size}, but the launcher started {world} processes"
        )
    if not 0 <= rank < world:
        raise OptionError("world_size", f"{world} processes have no number {rank}: see RANK")
    return Processes(rank, world, local_rank, local_world)


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise OptionError(
            "distributed", f"{variable} is no number: {os.environ[variable]!r}"
        ) from None


def _meet(options: DistOptions, processes: Processes) -> dist.Store:
    """The store through which the processes find each other, once all of them are there."""
    rank, world, seconds = processes.rank, processes.world_size, options.dist_start_timeout
    where = options.dist_url
    if where == "env://":
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        # A launcher's store outlives the processes that it starts anew after a failure.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt/{attempt}", _open_store(options, processes))
        here = store.add(f"number/{rank}", 1)
        store.set(f"here/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            reason = "the port is in use"
        raise OptionError(
            "dist_url",
            f"process {rank} of {world} can't meet the others at {where}: {reason}. "
            "Choose a free port (MASTER_PORT, or torchrun --standalone), and check the address",
        ) from None
    if here > 1:
        raise OptionError("dist_url", f"two processes at {where} have RANK {rank}")
    deadline = time.monotonic() + seconds
    while missing := [r for r in range(world) if not store.check([f"here/{r}"])]:
        if time.monotonic() > deadline:
            raise OptionError(
                "world_size",
                f"of {world} processes number {first_names(missing, 8)} did not come to {where} "
                f"within {seconds} s: is WORLD_SIZE right, did they fail? Or raise "
                "--dist-start-timeout",
            )
        time.sleep(0.05)
    return store


def _open_store(options: DistOptions, processes: Processes) -> dist.Store:
    url, timeout = options.dist_url, timedelta(seconds=options.dist_start_timeout)
    of_launcher = url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if url.startswith("file://") or of_launcher:
        meeting = dist.rendezvous(url, processes.rank, processes.world_size, timeout=timeout)
        return next(iter(meeting))[0]
    if url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"{' and '.join(missing)} not set")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    else:
        parts = urlsplit(url)
        if parts.scheme != "tcp" or not parts.hostname or not parts.port:
            raise ValueError("neither env://, file://PATH nor tcp://HOST:PORT")
        host, port = parts.hostname, parts.port
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(
                dist.TCPStore(
                    host,
                    port,
                    processes.world_size,
                    processes.is_main,
                    timeout,
                    wait_for_workers=False,
                )
            )
        except Exception as error:
            found.append(error)

    # Something else that listens there would leave the connection waiting for ever.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(options.dist_start_timeout + GRACE)
    if not found:
        raise TimeoutError("what listens there doesn't answer")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


class _Watch:
    """Looks for the failure of another process while this one trains."""

    def __init__(self, store: dist.Store, processes: Processes) -> None:
        self.store = dist.PrefixStore("watch", store)
        self.processes = processes
        addresses = [json.loads(store.get(f"here/{r}")) for r in range(processes.world_size)]
        self.neighbours = {
            r: pid for r, (host, pid) in enumerate(addresses) if host == socket.gethostname()
        }
        self._stopped = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def explain(self, error: Exception) -> Exception:
        """What to raise for ``error``: itself, which the other processes then learn of, or the
        failure of another process that caused it."""
        self.stop()
        if isinstance(error, UserError) or not _is_lost_contact(error):
            self._report(error)
            return error
        deadline = time.monotonic() + GRACE
        while (failure := self._failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if failure is None:
            gone = [r for r, pid in self.neighbours.items() if not process_runs(pid)]
            names = f"process {', '.join(map(str, gone))} is gone"
            failure = {
                "line": f"lost contact: {names if gone else first_line(error)}; killed, "
                "out of memory, or cut off? --resume auto goes on from the last checkpoint",
                "code": 1,
            }
        return PeerError(failure["line"], failure["code"])

    def _report(self, error: Exception) -> None:
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, UserError) else 1
        self.tell(f"process {self.processes.rank} failed: {line}", code)

    def tell(self, line: str, code: int) -> None:
        """Let the other processes leave with ``line`` and exit code ``code``."""
        self.stop()
        with contextlib.suppress(RuntimeError):
            failure = json.dumps({"line": line, "code": code})
            self.store.compare_set(_FAILED, "", failure)
            deadline = time.monotonic() + GRACE
            others = self.processes.world_size - 1
            # The store may live in this process: the others must have read it before it ends.
            self.store.add("left", 1)
            while self.processes.is_main and time.monotonic() < deadline:
                if self.store.add("left", 0) > others:
                    break
                time.sleep(0.05)

    def _failure(self) -> dict[str, Any] | None:
        """The first failure that was reported, if any."""
        try:
            if not self.store.check([_FAILED]):
                return None
            failure = json.loads(self.store.get(_FAILED))
            self.store.add("left", 1)
        except RuntimeError:
            # It lives in the main process, or in the launcher.
            return {"line": "lost contact with process 0 or the launcher: it is gone", "code": 1}
        return failure

    def _look(self) -> None:
        while not self._stopped.wait(POLL):
            failure = self._failure()
            if failure is None:
                continue
            if self._stopped.wait(GRACE):
                return
            # The main thread waits in an exchange that will not end.
            print(f"error: {failure['line']}", file=sys.stderr, flush=True)
            os._exit(failure["code"])


def _is_lost_contact(error: Exception) -> bool:
    """Whether ``error`` comes from an exchange with a process that is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
