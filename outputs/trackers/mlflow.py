"""MLflow (package mlflow, or mlflow-skinny): the server or database of MLFLOW_TRACKING_URI."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outputs.trackers.run_info import RunInfo

PACKAGE = "mlflow"
OFFLINE = "MLFLOW_TRACKING_URI=sqlite:///mlflow.db keeps the run in a file"
KEY = "run_key"  # tag by which a resumed run is found
MOST_PARAMS = 100  # of one call
LONGEST_PARAM = 6000  # characters


def prepare() -> None:
    """Import the package. It reports its use to its makers unless it is told not to."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # It speaks of every try to reach a server, and MLflow makes seven.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    import mlflow  # noqa: F401


class MlflowRun:
    """A run of MLflow. Options are its parameters; those that a resumed run changed, which MLflow
    can't change, are tags ``changed.NAME``."""

    def __init__(self, info: RunInfo) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._experiment(info.project)
        run = self._earlier(experiment, info.key) if info.went_on else None
        self.last = 0
        if run is None:
            run = self._client.create_run(experiment, run_name=info.name, tags={KEY: info.key})
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
            self.last = self._last(run)
        self._id = run.info.run_id
        self._log_options(info.options, run.data.params)
        self.place = f"run {self._id} in {self._client.tracking_uri}"

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def _earlier(self, experiment: str, key: str) -> Any:
        """The newest run with that key, or None."""
        runs = self._client.search_runs([experiment], f"tags.{KEY} = '{key}'", max_results=1)
        return runs[0] if runs else None

    def _last(self, run: Any) -> int:
        # The latest value of a name doesn't come with its step.
        names = [name for name in ("step/loss", "epoch/epoch") if name in run.data.metrics]
        histories = [self._client.get_metric_history(run.info.run_id, name) for name in names]
        return max((value.step for history in histories for value in history), default=0)

    def _log_options(self, options: Mapping[str, Any], there: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        texts = {name: str(value)[:LONGEST_PARAM] for name, value in options.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in there]
        for part in _parts(new, MOST_PARAMS):
            self._client.log_batch(self._id, params=part)
        changed = [n for n, text in texts.items() if n in there and there[n] != text]
        tags = [RunTag(f"changed.{name}", texts[name]) for name in changed]
        for part in _parts(tags, MOST_PARAMS):
            self._client.log_batch(self._id, tags=part)

    def log(self, values: Mapping[str, float], update: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, update) for name, value in values.items()]
        )

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """``values`` in lists of at most ``size``."""
    return (values[start : start + size] for start in range(0, len(values), size))


open_run = MlflowRun
