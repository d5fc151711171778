"""Weights & Biases (package wandb)."""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from outputs.files import check_writable
from outputs.trackers.run_info import RunInfo

PACKAGE = "wandb"
OFFLINE = "WANDB_MODE=offline keeps the run on disk, for `wandb sync` later"
SECONDS = 20.0  # to begin and to end, without which wandb waits for minutes
AXIS = "update"


def prepare() -> None:
    """Import the package. It reports its own errors to its makers unless it is told not to."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # noqa: F401
    from wandb.sdk.lib import wb_logging

    if not hasattr(wb_logging.add_file_handler, "__wrapped__"):
        wb_logging.add_file_handler = _quiet(wb_logging.add_file_handler)


def _quiet(add: Callable[..., logging.Handler]) -> Callable[..., logging.Handler]:
    """W&B's own log, without a traceback on the console for each line that a full disk refuses."""

    @functools.wraps(add)
    def added(*given: object) -> logging.Handler:
        handler = add(*given)
        handler.handleError = lambda record: None
        return handler

    return added


class WandbRun:
    """A run of W&B. Its files are in the run's folder, under ``wandb/``.

    W&B's own counter of steps can't go back, and drops what is behind it; so the update is a value
    of its own and the axis of all others.
    """

    def __init__(self, info: RunInfo) -> None:
        import wandb

        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        offline = mode in ("offline", "disabled")
        # Without that it would ask for a key on a terminal, and wait.
        if not offline and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: set WANDB_API_KEY, or call `wandb login`")
        settings = wandb.Settings(
            # Neither the command line, nor code, nor what is printed: secrets may be in them.
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_save_requirements=False,
            silent=True,
            init_timeout=SECONDS,
            finish_timeout=SECONDS,
        )
        self._run = wandb.init(
            project=info.project,
            name=info.name,
            id=info.key,
            resume="allow",
            dir=str(info.folder),
            config=dict(info.options),
            allow_val_change=True,
            reinit="create_new",
            settings=settings,
        )
        self._run.define_metric(AXIS, hidden=True)
        for names in ("step/*", "epoch/*"):
            self._run.define_metric(names, step_metric=AXIS)
        self.last = int(self._run.summary.get(AXIS) or 0)
        # Its process writes what `wandb sync` sends, and says nothing of what it can't write.
        self._folder = Path(self._run.settings.sync_dir) if mode == "offline" else None
        synced = f"offline, `wandb sync {self._run.settings.sync_dir}`"
        self.place = synced if offline else self._run.url or info.key

    def log(self, values: Mapping[str, float], update: int) -> None:
        self._run.log({**values, AXIS: update})
        if any(name.startswith("epoch/") for name in values):
            self._check()

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
        self._check()

    def _check(self) -> None:
        if self._folder is not None:
            check_writable(self._folder)


open_run = WandbRun
