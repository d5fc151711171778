"""Trainings on disks that are full, fill up or become read-only: they go on to their end, and what
they say of their files is true."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import fill, read_only, small_disk
from runs import PATIENCE, assert_same_state, at_update, logged, newest, stopped_after, train

from checkpointing.files import load_checkpoint
from checkpointing.folder import BEST, checkpoints_in
from checkpointing.writer import THREAD
from errors import CheckpointError
from training.lock import LOCK_FILE

SHORT = ("--epochs", "1", "--warmup-epochs", "0", "--tensorboard", "--tb-histograms")


def leftovers(folder: Path) -> list[str]:
    """What a run must not leave: temporary files and its lock."""
    return [p.name for p in folder.rglob("*") if ".tmp" in p.name or p.name == LOCK_FILE]


def whole(folder: Path) -> list[str]:
    """The checkpoints that can be read, newest first."""
    found = []
    for path in checkpoints_in(folder):
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)
            found.append(path.name)
    return found


def once_written(action: Callable[[], object]) -> None:
    """Do ``action`` when no checkpoint is being written."""
    deadline = time.monotonic() + PATIENCE
    while any(thread.name == THREAD for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    action()


@pytest.mark.parametrize("kibibytes", [4, 24, 256, 4096, 32768])
def test_a_training_in_any_room(images, tmp_path, capsys, curves, kibibytes):
    """From one page to enough: it comes to its end, and its exit code says what is there."""
    with small_disk(tmp_path / "disk", kibibytes) as disk:
        code = train(images, disk / "run", *SHORT)
        shown = capsys.readouterr().out
        saved = whole(disk / "run")
        assert leftovers(disk / "run") == []
        assert saved == [p.name for p in checkpoints_in(disk / "run")]
    assert "epoch 1/1  train loss" in shown
    assert code == (0 if saved else 1) and bool(saved) == (kibibytes > 10000)
    assert ("could NOT be written" in shown) == bool(code) and "--resume None" not in shown
    warnings = [line for line in shown.splitlines() if line.startswith("warning: not written")]
    files = [line.split(": ")[2] for line in warnings]
    assert len(files) == len(set(files)) and bool(files) == bool(code), warnings


def test_no_room_at_the_start_is_one_line_and_leaves_no_lock(images, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 64) as disk:
        fill(disk)
        assert train(images, disk / "run") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --output-dir: ") and error.count("\n") == 1
        assert "No space left on device (free space there" in error
        assert list((disk / "run").iterdir()) == []


@pytest.fixture(scope="module")
def untouched(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untouched") / "run"
    assert train(images, folder) == 0
    return folder


def test_a_disk_that_fills_up_and_has_room_again(images, untouched, tmp_path, capsys):
    """The epoch's checkpoint is missing; all else is as if nothing had been."""
    with small_disk(tmp_path / "disk", 65536) as disk:
        filler = disk / "fill"
        with (
            at_update(8, lambda: once_written(lambda: fill(disk))),
            at_update(14, lambda: once_written(filler.unlink)),
        ):
            assert train(images, disk / "run", "--keep", "9") == 0
        shown = capsys.readouterr().out
        assert whole(disk / "run") == ["checkpoint-0003.pth", "checkpoint-0001.pth"]
        assert shown.count("checkpoint-0002.pth: No space left on device") == 1
        assert "checkpoints can be written again" in shown
        assert_same_state(newest(untouched), newest(disk / "run"))
        assert logged(untouched) == logged(disk / "run")
        for name in (BEST, "per_class.csv"):
            assert (untouched / name).exists() == (disk / "run" / name).exists()
        best = load_checkpoint(disk / "run" / BEST)
        assert_same_state(load_checkpoint(untouched / BEST), best)
        assert leftovers(disk / "run") == []


def test_a_disk_that_becomes_read_only(images, untouched, tmp_path, capsys):
    """The run goes on and says in the end what is lost; its resumption ends like the untouched."""
    with small_disk(tmp_path / "disk", 65536) as disk:
        with at_update(9, lambda: once_written(lambda: read_only(disk))):
            assert train(images, disk / "run") == 1
        shown = capsys.readouterr().out
        assert "epoch 3/3  train loss" in shown
        assert "the lock stays" in shown and "read-only" in shown
        assert f"--resume {disk / 'run' / 'checkpoint-0001.pth'}" in shown
        read_only(disk, on=False)
        assert train(images, disk / "run", "--resume", "auto") == 0
        assert_same_state(newest(untouched), newest(disk / "run"))
        assert logged(untouched) == logged(disk / "run")
        assert leftovers(disk / "run") == []


@pytest.mark.parametrize("how", ["signal", "early stop"])
def test_a_last_checkpoint_that_has_no_room_is_not_said_to_be_saved(images, tmp_path, capsys, how):
    with small_disk(tmp_path / "disk", 65536) as disk:
        with (
            at_update(7, lambda: once_written(lambda: fill(disk))),
            contextlib.ExitStack() as stack,
        ):
            stopping = ("--early-stop", "1", "--early-stop-delta", "1000")
            if how == "signal":
                stack.enter_context(stopped_after(9))
                stopping = ()
            assert train(images, disk / "run", *stopping) == 1
        shown = capsys.readouterr().out
        assert whole(disk / "run") == ["checkpoint-0001.pth"]
        assert leftovers(disk / "run") == []
        assert "could NOT be" in shown and "; saved" not in shown
        assert f"--resume {disk / 'run' / 'checkpoint-0001.pth'}" in shown
