"""What the system says of processes: that they run, since when, and what they have used."""

import os
import subprocess
import sys
import time

import pytest

from distributed.liveness import cpu_seconds, process_runs, process_start

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended and was waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_runs_until_it_ends(ended):
    assert process_runs(os.getpid())
    assert process_runs(1)  # of another user, where the tests run as one
    assert not process_runs(ended)


@needs_proc
def test_a_zombie_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", "print()"], stdout=subprocess.PIPE)
    process.stdout.read()  # its end
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{process.pid}")
    assert not process_runs(process.pid)
    assert process_start(process.pid) is None
    process.wait()


@needs_proc
def test_the_start_tells_processes_apart(ended):
    mine = process_start(os.getpid())
    assert mine == process_start(os.getpid())
    time.sleep(0.05)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert int(process_start(other.pid)) > int(mine)
    assert process_start(ended) is None


@needs_proc
def test_seconds_of_a_core():
    before, ours = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < ours + 0.2:
        pass
    assert cpu_seconds(os.getpid()) - before == pytest.approx(0.2, abs=0.05)
