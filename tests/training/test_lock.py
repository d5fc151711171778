"""Two runs never write into one directory; what a dead run left behind is no obstacle."""

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import fill, read_only, small_disk
from runs import PATIENCE, ROOT

from errors import OptionError
from tools.torture import locks
from training.lock import LOCK_FILE, SILENCE, WRITING, RunLock, holder_of


def write(folder: Path, **changed: object) -> None:
    """The lock of this process, but for what is ``changed`` in it."""
    lock = RunLock(folder)
    content = json.loads((folder / LOCK_FILE).read_text())
    lock.release()
    assert changed.keys() <= content.keys()
    (folder / LOCK_FILE).write_text(json.dumps(content | changed))


def until(true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    until(lambda: (tmp_path / LOCK_FILE).stat().st_mtime > 2)
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


def test_a_lock_that_was_removed_is_made_again(tmp_path, monkeypatch, caplog):
    """Without its folder it can't be, which is said once; once the folder is back it is."""
    monkeypatch.setattr("training.lock.HEARTBEAT", 0.02)
    folder = tmp_path / "run"
    folder.mkdir()
    held = RunLock(folder)
    shutil.rmtree(folder)
    time.sleep(0.3)
    assert caplog.text.count("another run may take the folder") == 1
    folder.mkdir()
    until((folder / LOCK_FILE).exists)
    with pytest.raises(OptionError, match=f"process {os.getpid()}"):
        RunLock(folder)
    held.release()
    assert not list(folder.iterdir())


def test_a_release_leaves_the_lock_of_another_run(tmp_path, caplog):
    """Which took the folder after somebody had removed the first one's lock."""
    first = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    second = RunLock(tmp_path)
    first.release()
    with pytest.raises(OptionError, match="in use"):
        RunLock(tmp_path)
    second.release()
    assert not list(tmp_path.iterdir())


# --- several at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "the lock of a dead run"])
def test_of_several_starters_one_becomes_the_holder(left):
    result, rng = locks.Result(left), random.Random(0)
    for _ in range(12):
        locks.count(result, locks.start(locks.LEFT[left](), 4, rng, kill=False))
    assert (result.double, result.nobody, result.errors) == (0, 0, [])
    assert result.holders >= 12


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """The process's number decides on this host; two that take over at once see each other."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("training.lock.SETTLING", 0.1)
    first = RunLock(tmp_path)
    with pytest.raises(OptionError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)
    first.release()
    write(tmp_path, started="12345")
    RunLock(tmp_path).release()
    result, rng = locks.Result(""), random.Random(0)
    for _ in range(2):
        locks.count(result, locks.start(locks.LEFT["the lock of a dead run"](), 3, rng, kill=False))
    assert (result.double, result.nobody, result.errors) == (0, 0, [])


def test_a_forked_child_that_outlives_the_run_holds_nothing(tmp_path):
    """A worker that storage keeps from dying; nor does its release take the lock away."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        lock = RunLock(tmp_path)
        if os.fork() == 0:
            lock.release()
            os.write(writing, b"%d " % os.getpid())
            time.sleep(60)
        time.sleep(60)
    os.close(writing)
    try:
        child = int(os.read(reading, 99))
        with pytest.raises(OptionError, match=f"process {pid} "):
            RunLock(tmp_path)
        os.kill(pid, signal.SIGKILL)
        RunLock(tmp_path).release()
    finally:
        os.waitpid(pid, 0)
        os.kill(child, signal.SIGKILL)


# --- clocks, odd files --------------------------------------------------------------------------


@pytest.mark.parametrize("at_work", [True, False])
def test_a_lock_from_the_future_is_watched(tmp_path, monkeypatch, at_work):
    """The clock went back since: the age says nothing, a further sign of life does."""
    monkeypatch.setattr("training.lock.HEARTBEAT", 0.3)
    monkeypatch.setattr("training.lock.SETTLING", 0.1)
    write(tmp_path, host="elsewhere", pid=1)
    ahead = time.time() + 86400
    os.utime(tmp_path / LOCK_FILE, (ahead, ahead))
    timer = threading.Timer(0.2, os.utime, (tmp_path / LOCK_FILE, (ahead + 1, ahead + 1)))
    if at_work:
        timer.start()
        with pytest.raises(OptionError, match="process 1 on elsewhere"):
            RunLock(tmp_path)
    else:
        RunLock(tmp_path).release()


ODD = {
    "pid a text": {"pid": "1"},
    "pid far too large": {"pid": 10**30},
    "pid negative": {"pid": -1},
}
ODD |= {
    "host a list": {"host": ["x"]},
    "job a number": {"job": 7},
    "started a list": {"started": []},
}


@pytest.mark.parametrize("changed", ODD.values(), ids=ODD.keys())
def test_a_lock_of_odd_types_is_no_lock_of_a_run(tmp_path, monkeypatch, changed):
    monkeypatch.setattr("training.lock.WRITING", 0.1)
    write(tmp_path, **changed)
    assert holder_of(tmp_path) is None
    RunLock(tmp_path).release()


def test_deeply_nested_text_is_no_lock_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("training.lock.WRITING", 0.1)
    (tmp_path / LOCK_FILE).write_bytes(b"[" * 60_000)
    RunLock(tmp_path).release()


def test_a_huge_lock_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("training.lock.WRITING", 0.1)
    (tmp_path / LOCK_FILE).touch()
    os.truncate(tmp_path / LOCK_FILE, 1 << 40)
    RunLock(tmp_path).release()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_what_is_no_file_is_one_line(tmp_path, kind):
    path = tmp_path / LOCK_FILE
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("/dev/zero"),
        "device": lambda: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5)),
    }
    try:
        make[kind]()
    except PermissionError:
        pytest.skip("making a device needs root")
    with pytest.raises(OptionError, match=r"run\.lock is not a regular file.*remove it$"):
        RunLock(tmp_path)
    assert holder_of(tmp_path) is None


def test_a_name_with_commands_for_a_terminal_is_shown_as_text(tmp_path):
    write(tmp_path, host="\x1b[2Jelsewhere\n")
    with pytest.raises(OptionError) as raised:
        RunLock(tmp_path)
    assert r"on \x1b[2Jelsewhere\n" in str(raised.value)
