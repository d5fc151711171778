"""Runs that are killed where it hurts; ``tools.torture kills`` does so at any moment."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import arguments, assert_same_state, logged, newest, run_processes, train

from tools.torture.comparing import tensorboard_differences


def session(folder: Path, argv: list[str]) -> int:
    """The exit code of a run in a process of its own, forked from this one; -9: it was killed."""
    codes, output = run_processes(argv, folder.with_name("output.txt"), 1)
    assert codes is not None, output
    return codes[0]


def killed_at(monkeypatch, place: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """From here on processes are killed in place of a call of a function for which ``when`` is."""
    module, _, name = place.rpartition(".")
    usual = getattr(sys.modules[module], name)
    monkeypatch.setattr(place, lambda *a, **k: kill_self() if when(*a) else usual(*a, **k))


def is_named(stem: str, path: Path, *_: object) -> bool:
    return path.stem == stem


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_kills_leave_no_trace_in_tensorboard(images, tmp_path, monkeypatch):
    """Before the first checkpoint, and between an epoch's records and its checkpoint; and the clock
    goes back by a day each time."""
    options = ("--save-every-steps", "3", "--tb-histograms", "--tb-graph", "--tensorboard")
    assert train(images, tmp_path / "whole", *options) == 0
    argv = arguments(images, tmp_path / "parts", *options, "--resume", "auto")
    moments = ("checkpoint-0000-00000012", "checkpoint-0001", "checkpoint-0002")
    for days, name in enumerate(moments):
        now = time.time() - 86400 * days
        with monkeypatch.context() as patch:
            patch.setattr("outputs.events.time.time", lambda now=now: now)
            killed_at(
                patch,
                "checkpointing.writer.save_checkpoint",
                lambda p, _, name=name: p.stem == name,
            )
            assert session(tmp_path / "parts", argv) == -signal.SIGKILL
    assert list((tmp_path / "parts" / "tensorboard").iterdir())
    assert session(tmp_path / "parts", argv) == 0
    assert tensorboard_differences(tmp_path / "whole", tmp_path / "parts") == []
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


@pytest.mark.parametrize("end", ["announce_end", "end_reached"])
def test_a_kill_after_the_last_save_ends_an_early_stop_too(images, tmp_path, monkeypatch, end):
    """Between the last checkpoint and the exit, with the process at work or before it knows."""
    options = (
        "--lr",
        "0",
        "--warmup-lr",
        "0",
        "--min-lr",
        "0",
        "--epochs",
        "6",
        "--early-stop",
        "1",
    )
    assert train(images, tmp_path / "whole", *options) == 0
    argv = arguments(images, tmp_path / "parts", *options, "--resume", "auto")
    with monkeypatch.context() as patch:
        last = (tmp_path / "parts" / "checkpoint-0002.pth").exists
        killed_at(patch, f"training.trainer.{end}", lambda *_: last())
        assert session(tmp_path / "parts", argv) in (-signal.SIGKILL, 0)
    assert session(tmp_path / "parts", argv) == 0
    assert_same_state(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
