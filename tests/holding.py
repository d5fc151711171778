"""A plug-in that holds a run between two steps until it is sent a signal.

A test that interferes with a training of another process is then certain to meet it where the test
says, however fast or slow the machine is.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

FOLDER, UPDATES = "HOLD_FOLDER", "HOLD_UPDATES"
OPTIONS = ("--plugin", __file__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def variables(folder: Path, *updates: int) -> dict[str, str]:
    """The environment of a run with OPTIONS whose first process is held after its ``updates[0]``-th
    update; when it is started again, after another ``updates[1]``, and so on; then no more.

    Each time it makes a file in ``folder``: ``held-0``, ``held-1``, …
    """
    return {FOLDER: str(folder), UPDATES: " ".join(map(str, updates))}


def wait_for_hold(
    folder: Path, number: int, ended: Callable[[], bool], output: Callable[[], str]
) -> None:
    """Wait until a run is held for the ``number``-th time, from 0 on.

    Fails with the run's ``output()`` as soon as the run has ``ended()`` without that.
    """
    mark = folder / f"held-{number}"
    while not mark.exists():
        assert not ended() or mark.exists(), output()
        time.sleep(0.05)


def hold_until_signal(mark: Path) -> None:
    """Make ``mark`` and wait for a signal, which has its usual effect too."""
    came: list[int] = []
    usual = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: object) -> None:
        came.append(number)
        usual[number](number, frame)

    for number in SIGNALS:
        signal.signal(number, note)
    mark.touch()
    while not came:
        time.sleep(0.05)


def hold_this_session() -> None:
    """Hold this process as its environment says, if it is the first one of its run."""
    folder, updates = Path(os.environ[FOLDER]), os.environ[UPDATES].split()
    number = len(list(folder.glob("held-*")))
    if number == len(updates) or os.environ.get("RANK", "0") != "0":
        return
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == int(updates[number]):
            hold_until_signal(folder / f"held-{number}")

    register_optimizer_step_post_hook(count)


if FOLDER in os.environ:
    hold_this_session()
