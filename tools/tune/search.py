"""The search: trials are started, followed and finished, several at a time."""

import itertools
import signal
import time
from collections.abc import Sequence
from typing import Any

from errors import UserError
from tools.tune.study import RunningTrial, Study

POLL = 0.2  # seconds between looks at the logs
MOST_FAILURES = 3  # in a row, after which something else is wrong than the options


class StopSignal:
    """Takes note of SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last signal; 0 where none came."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def search(study: Study, most: int, jobs: int, devices: Sequence[str]) -> int:
    """Run trials, ``jobs`` at a time, until the study has ``most``; returns the exit code."""
    free = list(itertools.islice(itertools.cycle(devices or [""]), jobs))
    running: list[RunningTrial] = []
    failures = 0
    with StopSignal() as stop:
        while not stop.number:
            while free and failures < MOST_FAILURES:
                started = study.start(most, free[0])
                if started is None:
                    break
                free.pop(0)
                running.append(started)
            if not running:
                break
            time.sleep(POLL)
            for one in list(running):
                if one.training.process.poll() is None:
                    study.follow(one)
                    continue
                running.remove(one)
                free.append(one.device)
                failures = 0 if study.finish(one) else failures + 1
                study.write_results()
        if stop.number:
            study.stop(running)
            print("stopped; the same command goes on with the study")
            return 128 + stop.number
    if failures >= MOST_FAILURES:
        raise UserError(
            f"{failures} trials in a row failed, the last as {study.folder}/trial-*/output.txt says"
        )
    return 0
