"""Where processes meet: who may remove a file, and rounds at the store of a launcher."""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from config import DistOptions
from distributed.meeting import hold_meeting_file, meet
from distributed.processes import Processes
from tools.torture.processes import wait


def test_a_file_that_nobody_holds_is_removed(tmp_path):
    file = tmp_path / "meet"
    pid = os.fork()
    if not pid:
        hold_meeting_file(file)
        file.write_text("of a run that was killed")
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert file.exists()
    hold_meeting_file(file)
    assert not file.exists()


def test_a_file_that_somebody_holds_stays(tmp_path):
    file = tmp_path / "meet"
    hold_meeting_file(file)
    file.write_text("of a run")
    for _ in range(2):
        hold_meeting_file(file)
        assert file.read_text() == "of a run"


def test_a_launcher_starts_ranks_anew_without_counting_it(monkeypatch):
    """A machine came, then one was changed for another: the store and the count of restarts stay,
    and so do signs of life and failures of those who were there before."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")

    def start(rank: int, world: int) -> int:
        if not (pid := os.fork()):
            code = 1
            try:
                options = DistOptions(dist_start_timeout=10)
                meeting = meet(options, Processes(rank, world))
                assert len({peer.pid for peer in meeting.peers}) == world
                assert meeting.peers[rank].pid == os.getpid()
                assert not meeting.store.check(["watch/failed"])
                meeting.store.set(f"done/{rank}", "")
                meeting.store.wait([f"done/{r}" for r in range(world)])
                meeting.store.set("watch/failed", "{}")
                code = 0
            finally:
                os._exit(code)
        return pid

    for world in (2, 3, 3):
        pids = [start(rank, world) for rank in range(world)]
        assert wait(pids, time.monotonic() + 60) == [0] * world
