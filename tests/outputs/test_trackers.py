"""Feeds of trackers: none delays or ends a run, whatever it does; what none of them gets."""

import contextlib
import importlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping

import pytest
from disks import fill, small_disk

import config
from errors import OptionError
from outputs.trackers import feed
from outputs.trackers.feed import Feed, Feeds, check_installed
from outputs.trackers.run_info import RunInfo, without_secrets


class Kept:
    """A tracker that keeps what it gets; ``last`` is of an earlier session."""

    place = "here"

    def __init__(self, last: int = 0, fails: tuple[int, ...] = ()) -> None:
        self.last, self.fails = last, fails
        self.got: list[tuple[int, dict[str, float]]] = []
        self.finished: bool | None = None

    def log(self, values: Mapping[str, float], update: int) -> None:
        if update in self.fails:
            raise ConnectionError("no\nroute")
        self.got.append((update, dict(values)))

    def close(self, *, finished: bool) -> None:
        self.finished = finished


def feeds_of(open_run: Callable[[], Kept]) -> Feeds:
    feeds = Feeds()
    feeds._feeds = [Feed("kept", open_run, "the hint")]
    return feeds


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_numbers_arrive_in_order(caplog):
    tracker = Kept()
    feeds = feeds_of(lambda: tracker)
    feeds.log({"step/loss": 1.5, "note": "text", "none": None}, 1)
    feeds.log({"step/loss": 1, "flag": True}, 2)
    feeds.log({"epoch/epoch": 1}, 2, epoch=True)
    feeds.close(finished=True)
    assert tracker.got == [
        (1, {"step/loss": 1.5}),
        (2, {"step/loss": 1.0, "flag": 1.0}),
        (2, {"epoch/epoch": 1.0}),
    ]
    assert tracker.finished is True and not warnings(caplog)


def test_what_an_earlier_session_logged_is_left_out():
    tracker = Kept(last=4)
    feeds = feeds_of(lambda: tracker)
    feeds.log({"epoch/a": 0}, 3, epoch=True)
    feeds.log({"a": 0}, 4)
    feeds.log({"epoch/a": 1}, 4, epoch=True)  # the earlier one may have ended before it
    feeds.log({"a": 2}, 5)
    feeds.log({"a": 9}, 5)  # as after a rollback
    feeds.close(finished=False)
    assert tracker.got == [(4, {"epoch/a": 1.0}), (5, {"a": 2.0})]
    assert tracker.finished is False


def test_failures_are_said_once_and_what_follows_is_logged(caplog):
    tracker = Kept(fails=(1, 2))
    feeds = feeds_of(lambda: tracker)
    for update in (1, 2, 3):
        feeds.log({"a": update}, update)
    feeds.close(finished=True)
    assert tracker.got == [(3, {"a": 3.0})]
    assert warnings(caplog) == ["tracker kept: no; values are missing there (the hint)"]


def test_a_tracker_that_does_not_open_is_gone_on_without(caplog):
    def refuse() -> Kept:
        raise SystemExit("no key")

    feeds = feeds_of(refuse)
    for update in range(3):
        feeds.log({"a": 1}, update)
    feeds.close(finished=True)
    assert warnings(caplog) == ["tracker kept: no key; going on without it (the hint)"]


def test_a_tracker_that_hangs_is_not_waited_for(caplog, monkeypatch):
    monkeypatch.setattr(feed, "FINISH_SECONDS", 0.05)
    monkeypatch.setattr(feed, "MOST_WAITING", 5)
    hangs = threading.Event()
    feeds = feeds_of(lambda: hangs.wait() and Kept())
    start = time.monotonic()
    for update in range(20):
        feeds.log({"a": 1}, update)
    feeds.close(finished=True)
    assert time.monotonic() - start < 30  # and not for ever
    hangs.set()
    full, left = warnings(caplog)
    assert full.endswith("it takes nothing; what comes meanwhile is left out")
    assert "not waiting any longer" in left and left.endswith("(the hint)")


def test_a_signal_shortens_the_wait_at_the_end(caplog, monkeypatch):
    monkeypatch.setattr(feed, "STOP_SECONDS", 0.05)
    hangs = threading.Event()
    feeds = feeds_of(lambda: hangs.wait() and Kept())
    asked = iter([False, True])
    start = time.monotonic()
    feeds.close(finished=True, stopping=lambda: next(asked))
    assert time.monotonic() - start < feed.FINISH_SECONDS / 2
    hangs.set()
    assert "not waiting any longer" in warnings(caplog)[0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_tracker_cannot_write_is_said(name, tmp_path, monkeypatch, capfd):
    """Their libraries write from a process or thread of their own, and train on without a word."""
    with small_disk(tmp_path / "disk", 64) as disk:
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", disk)
        tracker = importlib.import_module(f"outputs.trackers.{name}")
        tracker.prepare()
        run = tracker.open_run(RunInfo("mushrooms", "run", "0123456789abcdef", disk, {}))
        fill(disk)
        with pytest.raises((OSError, RuntimeError), match="No space|is full|I/O"):
            for update in range(3):
                run.log({"epoch/loss": 1.0}, update)
            run.close(finished=True)
        with contextlib.suppress(OSError, RuntimeError):
            run.close(finished=True)
    assert "Traceback" not in capfd.readouterr().err


def test_a_missing_package_is_an_error_that_names_it(monkeypatch, tmp_path):
    check_installed(["wandb", "mlflow", "trackio"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="--log-to: wandb: pip install wandb"):
        check_installed(["wandb"])


def test_a_folder_of_wandbs_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "nowhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("outputs.trackers.wandb.PACKAGE", "nowhere")
    with pytest.raises(OptionError, match="pip install nowhere"):
        check_installed(["wandb"])


def test_another_tracker_is_refused():
    with pytest.raises(OptionError, match="--log-to: 'mlfow' is no tracker: did you mean mlflow"):
        config.load(["--data-path", "x", "--log-to", "wandb", "mlfow"])


def test_addresses_lose_what_opens_them():
    given = {
        "data_path": "s3://user:pass@host/a/{0..9}.tar",
        "finetune": "https://host/a.pth?X-Signature=abc#part",
        "several": ["x", ("https://token@h/b?c", "https://me@firm:secret@h/b")],
        "lr": 0.1,
        "note": "what? a@b",
    }
    assert without_secrets(given) == {
        "data_path": "s3://host/a/{0..9}.tar",
        "finetune": "https://host/a.pth",
        "several": ["x", ["https://h/b", "https://h/b"]],
        "lr": 0.1,
        "note": "what? a@b",
    }
