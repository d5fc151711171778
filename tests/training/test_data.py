"""training/data.py: files that are listed once, what the shared memory of a machine allows, and
images kept on disk."""

import errno
import os
import signal
import types

import pytest
from runs import (
    STOPPED,
    arguments,
    assert_same_state,
    logged,
    newest,
    run_processes,
    stopped_after,
    train,
)

DIGITS = ("--data-set", "DIGITS", "--batch-size", "64", "--input-size", "32", "--epochs", "1")
DIGITS += ("--warmup-epochs", "0", "--no-repeated-aug", "--no-model-ema")


@pytest.fixture
def one_mib(monkeypatch):
    """/dev/shm has one MiB free."""
    usage = types.SimpleNamespace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def test_too_many_workers_for_the_shared_memory(one_mib, tmp_path, capsys):
    # A batch has 64 images of 3072 bytes; a worker needs room for 3 times 2.5 of them.
    assert train("", tmp_path, *DIGITS, "--num-workers", "3") == 2
    error = capsys.readouterr().err
    assert "--num-workers: /dev/shm has room for the batches of 0 workers, not of 3" in error
    assert "--shm-size" in error


def test_auto_takes_as_many_workers_as_fit(images, tmp_path, capsys, monkeypatch):
    # A batch has 4 images of 192 bytes: there is room for one of them.
    usage = types.SimpleNamespace(free=1 << 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("training.data.auto_num_workers", lambda processes: 2)
    options = ("--epochs", "1", "--warmup-epochs", "0", "--num-workers", "auto", "--cache", "none")
    assert train(images, tmp_path, *options) == 0
    shown = capsys.readouterr()
    # Training and evaluation have loaders of their own.
    assert (shown.out + shown.err).count("0 workers instead of 2: /dev/shm has no room") == 1


def test_a_run_is_the_same_whatever_the_disk_cache_holds(images, tmp_path, capsys):
    def kept(name, *more):
        options = ("--no-repeated-aug", "--epochs", "2", "--cache", "disk", "--cache-dir")
        return (*options, str(tmp_path / name), *more)

    assert train(images, tmp_path / "whole", *kept("a")) == 0
    said = capsys.readouterr().out
    # Of 24 training images, in two files: those of evaluation have one of their own.
    assert "disk cache of 24 images 0 % filled" in said
    assert "disk cache of 24 images 100 % filled" in said
    with stopped_after(4):
        assert train(images, tmp_path / "parts", *kept("b", "--cache-gb", "1e-5")) == STOPPED
    shown = capsys.readouterr()
    assert "--cache-gb allows" in shown.out + shown.err
    assert train(images, tmp_path / "parts", *kept("a", "--resume", "auto")) == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_a_kept_side_below_the_input_is_refused(images, tmp_path, capsys):
    options = ("--cache", "disk", "--cache-dir", str(tmp_path), "--cache-side", "7")
    assert train(images, tmp_path / "run", *options) == 2
    assert "--cache-side: 7 is less than the input's 8 pixels" in capsys.readouterr().err


def denied(folder: str) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", folder)


def killed(folder: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "action, codes, said",
    [
        (denied, [2, 2], "blue: Permission denied"),
        (killed, [-signal.SIGKILL, 1], "lost contact: process 0"),
    ],
)
def test_the_others_end_with_the_process_that_lists_the_files(
    images, tmp_path, monkeypatch, action, codes, said
):
    list_entries = os.scandir

    def scandir(folder: str = "."):
        if os.environ.get("RANK") == "0" and os.path.basename(folder) == "blue":
            action(folder)
        return list_entries(folder)

    monkeypatch.setattr("os.scandir", scandir)
    ended, output = run_processes(arguments(images, tmp_path / "run"), tmp_path / "log")
    assert ended == codes, output
    assert "Traceback" not in output
    assert output.count(said) == (2 if action is denied else 1)
