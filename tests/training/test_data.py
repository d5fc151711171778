"""training/data.py: what the shared memory of a machine allows."""

import types

import pytest
from runs import train

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
