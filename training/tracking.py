"""The run in trackers: what it is called there, and what a checkpoint keeps of that."""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import Config
from outputs.trackers.feed import Feeds
from outputs.trackers.run_info import RunInfo, without_secrets

_KEY = re.compile(r"[0-9a-f]{16}")


class Tracking:
    """The trackers of ``--log-to``, fed by the main process alone.

    A run has one key in all of them, which checkpoints keep: so a resumed run goes on in the same
    tracked run. Another ``--log-project`` or ``--log-name`` than the checkpoint's begins a new one.

    Args:
        config: of this session.
        folder: the run's.
        earlier: the entry ``tracking`` of the checkpoint that the run goes on from, if it has one.
        is_main: whether this is the main process.

    Attributes:
        noted: what checkpoints keep; None where the run never was tracked.
    """

    def __init__(
        self, config: Config, folder: Path, earlier: Mapping[str, Any] | None, *, is_main: bool
    ) -> None:
        self.feeds = Feeds()
        self.noted = dict(earlier) if earlier else None
        options = config.log
        if not (options.log_to and is_main):
            return
        name = options.log_name or folder.resolve().name
        given = {"project": options.log_project, "name": name}
        known = {k: v for k, v in (earlier or {}).items() if k != "key"} == given
        key = str((earlier or {}).get("key"))
        # A foreign checkpoint may hold anything there.
        went_on = known and _KEY.fullmatch(key) is not None
        self.noted = {"key": key if went_on else secrets.token_hex(8), **given}
        values = without_secrets(config.recipe())
        info = RunInfo(**self.noted, folder=folder.resolve(), options=values, went_on=went_on)
        self.feeds = Feeds(options.log_to, info)
