"""run.log: what a run says, with time and level, through full disks and over several sessions.

Also of training/console.py.
"""

import logging
import os
import re
from pathlib import Path

import pytest
from disks import fill, small_disk
from runs import STOPPED, stopped_after, train

from errors import UserError
from outputs.console import console, show_messages
from outputs.message_log import MessageLog
from training.console import message_log

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO   |WARNING|ERROR  ) (.*)")


def said(folder: Path) -> list[tuple[str, ...]]:
    lines = (folder / "run.log").read_text().splitlines()
    found = [LINE.fullmatch(line).groups() for line in lines]
    return [(level.strip(), text) for level, text in found]


@pytest.fixture
def log():
    with console():
        show_messages(logging.Formatter("%(message)s"), logging.INFO)
        handler = MessageLog()
        logging.getLogger().addHandler(handler)
        yield logging.getLogger("test")


def test_messages_of_all_sessions_are_in_the_folder(images, tmp_path, capsys):
    options = ("--epochs", "1", "--warmup-epochs", "0")
    with stopped_after(4):
        assert train(images, tmp_path, *options) == STOPPED
    assert train(images, tmp_path, *options, "--resume", "auto", "--log-level", "error") == 0
    shown = capsys.readouterr().out.splitlines()
    lines = said(tmp_path)
    # All that was printed, but for what a warning is called there.
    assert [text for _, text in lines] == [line.removeprefix("warning: ") for line in shown]
    assert any(text.startswith("epoch 1 [2/6]") for _, text in lines)
    assert lines[-1][1].startswith("go on with: ")  # the second had nothing to warn of


def test_an_error_that_ends_the_run_is_there(images, tmp_path):
    assert train(images, tmp_path, "--class-weights", tmp_path / "none.csv") == 2
    level, text = said(tmp_path)[-1]
    assert level == "ERROR" and text.startswith("--class-weights: ")


def test_a_traceback_is_there(tmp_path, log):
    with pytest.raises(ZeroDivisionError), message_log(tmp_path):
        log.info("before")
        1 / 0  # noqa: B018
    text = (tmp_path / "run.log").read_text()
    assert "INFO    before\n" in text and "ERROR   ended by\nTraceback " in text
    assert text.endswith("ZeroDivisionError: division by zero\n")


def test_what_comes_before_the_folder_is_known_is_there(tmp_path, log):
    log.warning("early")
    with pytest.raises(UserError), message_log(tmp_path):
        log.info("class %s", "a\nERROR b")
        raise UserError("late")
    levels = [("WARNING", "early"), ("INFO", r"class a\nERROR b"), ("ERROR", "late")]
    assert said(tmp_path) == levels
    log.info("elsewhere")
    assert said(tmp_path) == levels


def test_a_full_disk_is_said_once_and_nothing_is_lost(tmp_path, log, capsys):
    with small_disk(tmp_path / "disk", 64) as disk, message_log(disk):
        log.info("first")
        filler = fill(disk)
        for number in range(300):
            log.info("message %d%s", number, "." * 100)
        assert capsys.readouterr().out.count("not written: ") == 1
        filler.unlink()
        log.info("last")
        texts = [text.rstrip(".") for _, text in said(disk)]
    assert "first" in texts and "last" in texts
    assert [t for t in texts if t.startswith("message ")] == [f"message {n}" for n in range(300)]
    assert sum(t.startswith("not written: ") for t in texts) == 1


def test_a_forked_worker_writes_only_its_own(tmp_path, log):
    log.info("of the run")
    if (pid := os.fork()) == 0:
        with message_log(tmp_path):
            log.info("of the worker")
        os._exit(0)
    os.waitpid(pid, 0)
    with message_log(tmp_path):
        pass
    assert said(tmp_path) == [("INFO", "of the worker"), ("INFO", "of the run")]
