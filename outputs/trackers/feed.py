"""Trackers beside TensorBoard, each fed from a thread of its own: none delays or ends a run."""

import importlib
import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from errors import OptionError, first_line, os_error_text, printable
from outputs.trackers.run_info import RunInfo, Tracker

log = logging.getLogger(__name__)

MOST_WAITING = 10_000  # sets of values held for a tracker that doesn't take them
FINISH_SECONDS = 30.0  # for all trackers together to take what is left, at the end of a run
STOP_SECONDS = 10.0  # the same where a signal ends it, or comes while they do
_LOOK = 0.2  # seconds after which a wait looks whether a signal came


class _Values(NamedTuple):
    values: Mapping[str, float]
    update: int
    epoch: bool


class _End(NamedTuple):
    finished: bool


def check_installed(names: Sequence[str]) -> None:
    """Raise OptionError if the package of a tracker isn't installed."""
    for name in names:
        package = _adapter(name).PACKAGE
        spec = importlib.util.find_spec(package)
        # A folder of that name, which W&B makes, is found where the package is not.
        if spec is None or spec.origin is None:
            raise OptionError("log_to", f"{name}: pip install {package}")


def _adapter(name: str) -> ModuleType:
    return importlib.import_module(f"outputs.trackers.{name}")


class Feeds:
    """The trackers of a run.

    Args:
        names: of ``--log-to``.
        info: the run. Without ``names`` nothing is asked of it.
    """

    def __init__(self, names: Sequence[str] = (), info: RunInfo | None = None) -> None:
        self._feeds = []
        for name in dict.fromkeys(names):
            adapter = _adapter(name)
            try:
                # Here and not in the thread: a process that is forked meanwhile, as workers are,
                # would wait for its imports for ever.
                adapter.prepare()
            except Exception as error:
                log.warning("tracker %s: %s; going on without it", name, _reason(error))
                continue
            self._feeds.append(Feed(name, lambda a=adapter: a.open_run(info), adapter.OFFLINE))

    def log(self, values: Mapping[str, Any], update: int, *, epoch: bool = False) -> None:
        """Hand the numbers among ``values`` to all trackers; ``epoch``: they are of a whole one."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        for feed in self._feeds:
            feed.put(numbers, update, epoch=epoch)

    def close(self, *, finished: bool, stopping: Callable[[], bool] = lambda: False) -> None:
        """Let the trackers take what is left, for a limited time.

        ``stopping`` says whether a signal has come, after which that time is shorter.
        """
        for feed in self._feeds:
            feed.end(finished=finished)
        deadline = time.monotonic() + (FINISH_SECONDS if finished else STOP_SECONDS)
        asked = not finished
        while busy := [feed for feed in self._feeds if feed.alive]:
            now = time.monotonic()
            if not asked and stopping():
                asked, deadline = True, min(deadline, now + STOP_SECONDS)
            if now >= deadline:
                break
            busy[0].wait(min(_LOOK, deadline - now))
        for feed in self._feeds:
            feed.leave()
        self._feeds = []


class Feed:
    """Hands values to one tracker from a thread; what fails is said once.

    What a tracker has of an earlier session stays as it is: updates that a resumed run makes again
    are left out until it is further than that one was. With the same options their values are the
    same, to the last bit.

    Args:
        name: of the tracker, for messages.
        open_run: opens the run there.
        hint: what helps without a network.
    """

    def __init__(self, name: str, open_run: Callable[[], Tracker], hint: str) -> None:
        self._name, self._open_run, self._hint = name, open_run, hint
        self._waiting: queue.Queue[_Values | _End] = queue.Queue(MOST_WAITING)
        self._warned = False
        self._dead = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, values: Mapping[str, float], update: int, *, epoch: bool) -> None:
        """Hand over values of an update, at once."""
        if not self._dead:
            self._put(_Values(values, update, epoch))

    def _put(self, item: _Values | _End) -> None:
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._warn("it takes nothing; what comes meanwhile is left out")

    def end(self, *, finished: bool) -> None:
        """Say that nothing more comes."""
        self._put(_End(finished))

    @property
    def alive(self) -> bool:
        """Whether the tracker has not taken everything yet."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the tracker to take what is left."""
        self._thread.join(seconds)

    def leave(self) -> None:
        """Say so where the tracker has not taken everything."""
        if self.alive:
            log.warning(
                "tracker %s: it has not taken everything; not waiting any longer (%s)",
                self._name,
                self._hint,
            )

    def _work(self) -> None:
        try:
            tracker = self._open_run()
        except (Exception, SystemExit) as error:
            self._dead = True
            self._warn(f"{_reason(error)}; going on without it ({self._hint})")
            return
        log.info("tracker  %s: %s", self._name, printable(tracker.place))
        last = tracker.last
        while not isinstance(item := self._waiting.get(), _End):
            # The values of an epoch come after those of its last update.
            if item.update < last or item.update == last and not item.epoch:
                continue
            last = item.update
            self._try(lambda item=item: tracker.log(item.values, item.update))
        self._try(lambda: tracker.close(finished=item.finished))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:
            self._warn(f"{_reason(error)}; values are missing there ({self._hint})")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("tracker %s: %s", self._name, text)


def _reason(error: BaseException) -> str:
    text = os_error_text(error) if isinstance(error, OSError) and error.errno else first_line(error)
    return printable(text)
