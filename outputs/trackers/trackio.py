"""Trackio (package trackio): a database in TRACKIO_DIR, or the server or Space that its environment
names."""

from collections.abc import Mapping

from outputs.trackers.run_info import RunInfo

PACKAGE = "trackio"
OFFLINE = "without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL the run is kept in TRACKIO_DIR"


def prepare() -> None:
    """Import the package."""
    import trackio

    # Its own lines carry codes of terminals, and say what the run says.
    for module in (trackio, trackio.run, trackio.utils):
        vars(module)["print"] = lambda *parts, **options: None


class TrackioRun:
    """A run of Trackio, which finds a resumed run by its name: that has a part of the key."""

    def __init__(self, info: RunInfo) -> None:
        import trackio

        # Its threads keep what they could not write to themselves, as a warning of Python's.
        self._failures: list[str] = []
        vars(trackio.run)["_emit_nonfatal_warning"] = self._failures.append
        name = f"{info.name}-{info.key[:8]}"
        self._run = trackio.init(
            project=info.project,
            name=name,
            config=dict(info.options),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        # Read from the database or server when the run was opened.
        self.last = max(0, self._run._next_step - 1)
        self.place = f"run {name} of project {info.project}"

    def log(self, values: Mapping[str, float], update: int) -> None:
        self._run.log(dict(values), step=update)
        self._check()

    def close(self, *, finished: bool) -> None:
        self._run.finish()
        self._check()

    def _check(self) -> None:
        if self._failures:
            text, _, _ = self._failures.pop().partition(". ")
            raise RuntimeError(text)


open_run = TrackioRun
