"""Readers of foreign files answer hostile inputs with errors of the user; the harness sees others.

``python -m tools.torture fuzz`` reads 500,000 inputs; these are a few of each target.
"""

import os
import random
import signal
import time
import traceback

import pytest

from errors import UserError
from tools.torture import fuzz
from tools.torture.targets import Target, all_targets

INPUTS = 60


@pytest.mark.parametrize("name", all_targets())
def test_only_errors_of_the_user_come_out(name, tmp_path, monkeypatch):
    target = all_targets()[name]
    monkeypatch.chdir(tmp_path)
    for number in range(max(1, round(INPUTS * target.share))):
        given = fuzz.make_input(target, 1, number)
        outcome = fuzz.attack(target, given, tmp_path)
        if isinstance(outcome, BaseException):
            text = "".join(traceback.format_exception(outcome))
            pytest.fail(f"number {number} of seed 1: {given!r:.1000}\n{text}")


def harm(given, folder):
    """What readers do that have a bug."""
    if given == 1:
        raise UserError("refused")
    if given == 2:
        raise KeyError("not ours")
    if given == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if given == 4:
        time.sleep(60)
    if given == 5:
        b"." * (100 << 20)
    if given == 6:
        raise SystemExit(0)


def numbers(rng: random.Random) -> int:
    return rng.randrange(7)


def test_the_harness_counts_what_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "MEMORY", 30 << 20)
    target = Target("harm", numbers, harm)
    given = [fuzz.make_input(target, 3, number) for number in range(14)]
    assert set(given) == set(range(7)) and given.count(5) == 1
    (result,) = fuzz.run([target], 14, 3, tmp_path, 2)
    assert result.inputs == 14
    assert result.read == given.count(0)
    assert result.refused == given.count(1)
    assert result.failures == sum(given.count(n) for n in (2, 3, 4, 5, 6))
    assert result.slowest > 0.5
    kinds = {path.name.partition("-")[0]: path for path in (tmp_path / "harm").iterdir()}
    assert kinds.keys() == {"KeyError", "end", "hang", "memory", "SystemExit"}
    assert (kinds["KeyError"] / "input.txt").read_text() == "2"


def test_what_was_freed_before_hides_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MEMORY", 30 << 20)
    blocks: list[bytes | None] = [None] * 1300
    for i in range(len(blocks)):
        blocks[i] = b"." * 100_000
    pin = b"." * 100_000  # behind them, so that the allocator keeps what is freed
    blocks.clear()
    (result,) = fuzz.run([Target("harm", lambda rng: 5, harm)], 1, 3, tmp_path, 1)
    assert result.failures == 1 and pin


def test_the_command_names_targets_and_fails_for_failures(tmp_path, monkeypatch, capsys):
    assert fuzz.main(["--target", "config YAMI"]) == 2
    assert "did you mean config YAML?" in capsys.readouterr().err
    monkeypatch.setattr(fuzz, "all_targets", lambda: {"harm": Target("harm", lambda _: 2, harm)})
    assert fuzz.main(["--number", "3", "--out", str(tmp_path)]) == 1
    assert "| harm | 3 | 0 | 0 | 3 |" in capsys.readouterr().out
