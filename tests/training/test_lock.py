"""Two runs never write into one directory; what a dead run left behind is no obstacle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import fill, read_only, small_disk
from runs import ROOT

from errors import OptionError
from training.lock import LOCK_FILE, SILENCE, WRITING, RunLock


def write(folder: Path, **changed: object) -> None:
    """The lock of this process, but for what is ``changed`` in it."""
    lock = RunLock(folder)
    content = json.loads((folder / LOCK_FILE).read_text())
    lock.release()
    assert changed.keys() <= content.keys()
    (folder / LOCK_FILE).write_text(json.dumps(content | changed))


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(OptionError, match=f"process {os.getpid()} on .*choose another"):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom training.lock import RunLock\n"
        f"RunLock(Path({str(tmp_path)!r}))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OptionError, match=f"process {process.pid}"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
    RunLock(tmp_path).release()


def test_a_reused_process_number_is_not_the_holder(tmp_path):
    write(tmp_path, started="12345")
    RunLock(tmp_path).release()


def test_another_host_counts_while_it_gives_signs_of_life(tmp_path):
    write(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(OptionError, match="process 1 on elsewhere"):
        RunLock(tmp_path)
    past = time.time() - SILENCE - 1
    os.utime(tmp_path / LOCK_FILE, (past, past))
    RunLock(tmp_path).release()


def test_a_requeued_job_takes_over_its_own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(tmp_path, host="elsewhere", job="76")
    with pytest.raises(OptionError, match="job 76"):
        RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    write(tmp_path, host="elsewhere", job="77")
    RunLock(tmp_path).release()


def test_tasks_of_one_array_are_different_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    write(tmp_path, host="elsewhere", job="70_2")
    with pytest.raises(OptionError, match="job 70_2"):
        RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    write(tmp_path, host="elsewhere", job="70_3")
    RunLock(tmp_path).release()


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("training.lock.HEARTBEAT", 0.02)
    held = RunLock(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    deadline = time.monotonic() + 5
    while (tmp_path / LOCK_FILE).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > 2
    held.release()


@pytest.mark.parametrize("text", [b"", b"half a li", b"[]", b'{"host": "x"}', b"\xff\x00"])
def test_a_lock_that_is_not_whole_is_taken_over_when_old(tmp_path, text):
    (tmp_path / LOCK_FILE).write_bytes(text)
    past = time.time() - WRITING - 1
    os.utime(tmp_path / LOCK_FILE, (past, past))
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ahead", [0, 3600])
def test_a_lock_that_is_not_whole_is_waited_for_no_longer_than_writing_takes(
    tmp_path, monkeypatch, ahead
):
    """The storage's clock may be ahead of this machine's."""
    monkeypatch.setattr("training.lock.WRITING", 0.3)
    (tmp_path / LOCK_FILE).write_bytes(b"")
    os.utime(tmp_path / LOCK_FILE, (time.time() + ahead,) * 2)
    RunLock(tmp_path).release()


def test_no_room_for_a_lock_leaves_none(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        filler = fill(disk)
        with pytest.raises(OptionError, match=r"run.lock: No space left on device \(free space"):
            RunLock(disk)
        assert list(disk.iterdir()) == [filler]
        filler.unlink()
        RunLock(disk).release()


def test_a_lock_that_cannot_be_removed_is_said_and_holds_nobody(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 64) as disk:
        lock = RunLock(disk)
        with pytest.raises(OptionError, match="in use by process"):
            RunLock(disk)
        read_only(disk)
        lock.release()
        assert f"the lock stays: {disk / LOCK_FILE}: Read-only file system" in caplog.text
        with pytest.raises(OptionError, match="Read-only file system"):
            RunLock(disk)
        read_only(disk, on=False)
        RunLock(disk).release()
        assert not list(disk.iterdir())


def test_signs_of_life_that_fail_are_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("training.lock.HEARTBEAT", 0.02)
    held = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    time.sleep(0.3)
    assert caplog.text.count(LOCK_FILE) == 1
    held.release()
