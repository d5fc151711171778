"""Processes that freeze are named by the others; processes that freeze together go on."""

import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from distributed.processes import Processes
from distributed.watch import Meeting, Peer, Watch, first_beat
from tools.torture.processes import free_port, wait

SECONDS = 3  # of silence


def watching(log: Path, world: int = 2, seconds: float = SECONDS) -> list[int]:
    """Forked processes that watch each other through a store in the first one, and do nothing."""
    port = free_port()
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        sys.stderr = open(log, "a", encoding="utf-8")  # noqa: SIM115
        wait_for = timedelta(seconds=30)
        store = dist.TCPStore("127.0.0.1", port, world, not rank, wait_for, wait_for_workers=False)
        first_beat(store, rank)
        store.set(f"pid/{rank}", str(os.getpid()))
        known = [int(store.get(f"pid/{r}")) for r in range(world)]
        peers = [Peer(r, socket.gethostname(), pid) for r, pid in enumerate(known)]
        Watch(Meeting(store, peers, 0), Processes(rank, world), seconds)
        log.with_name(f"{log.name}.{rank}").touch()
        time.sleep(300)
        os._exit(0)
    while not all(log.with_name(f"{log.name}.{rank}").exists() for rank in range(world)):
        time.sleep(0.02)
    return pids


def test_who_freezes_is_named_and_who_all_freeze_go_on(tmp_path):
    """Three groups at once: rank 0 with the store is stopped, rank 1 is, both are and are woken."""
    groups = [watching(tmp_path / str(number)) for number in range(3)]
    time.sleep(1.2)
    together = groups[2]
    for pid in (groups[0][0], groups[1][1], *together):
        os.kill(pid, signal.SIGSTOP)
    try:
        for number, frozen in enumerate((0, 1)):
            other, still = groups[number][1 - frozen], groups[number][frozen]
            assert wait([other], time.monotonic() + 60) == [1]
            text = (tmp_path / str(number)).read_text()
            name = rf"process {frozen} \(host .*, pid {still}\) has given no sign of life for"
            assert re.search(rf"warning: {name} 1.5 s: it is stopped", text), text
            assert re.search(rf"error: {name} {SECONDS} s .*it is stopped .*--resume auto", text)
        time.sleep(1.0)
        for pid in together:
            os.kill(pid, signal.SIGCONT)
        assert wait(together, time.monotonic() + 1.5) is None  # they run
        assert not (tmp_path / "2").read_text()
    finally:
        for pid in (groups[0][0], groups[1][1], *together):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_who_is_killed_before_any_exchange_is_noticed(tmp_path):
    """No exchange breaks then; whoever waits for the dead one must not wait for the time limit."""
    left, killed = watching(tmp_path / "log", seconds=600)
    try:
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        assert wait([left], time.monotonic() + 60) == [1]
        text = (tmp_path / "log").read_text()
        name = rf"process 1 \(host .*, pid {killed}\)"
        assert re.search(rf"error: lost contact: {name} is gone; .*--resume auto", text), text
    except BaseException:
        os.kill(left, signal.SIGKILL)
        raise
