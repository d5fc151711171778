"""Runs that are tracked: what W&B, MLflow and Trackio hold, read back, is what TensorBoard has."""

import struct
from collections import defaultdict
from pathlib import Path

import pytest
from runs import PATIENCE, STOPPED, newest, stopped_after, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import load
from training.tracking import Tracking

Curves = dict[str, list[tuple[int, float]]]
TRACKED = ("--log-to", "wandb", "mlflow", "trackio", "--tensorboard")


@pytest.fixture
def offline(tmp_path, monkeypatch) -> str:
    """Trackers that keep runs below ``tmp_path``; a project of this test alone."""
    # However slow the machine: a session is to be sent before the next one begins.
    monkeypatch.setattr("outputs.trackers.feed.STOP_SECONDS", PATIENCE)
    monkeypatch.setattr("outputs.trackers.feed.FINISH_SECONDS", PATIENCE)
    monkeypatch.setenv("WANDB_MODE", "offline")
    # W&B makes folders when it is imported, which a process of pytest-xdist leaves behind.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    return "mushrooms"


def in_tensorboard(run: Path) -> Curves:
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    names = [n for n in events.Tags()["scalars"] if n.startswith(("step/", "epoch/"))]
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in names}


def in_wandb(file: Path) -> Curves:
    """The history in a file of W&B: records in LevelDB's log format, each a protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, found = file.read_bytes(), 7, b"", defaultdict(list)
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            items = Record.FromString(record).history.item
            values = {(i.nested_key or [i.key])[0]: float(i.value_json) for i in items}
            for name in values:
                if "/" in name:
                    found[name].append((int(values["update"]), values[name]))
            record = b""
    return dict(found)


def in_mlflow(project: str) -> tuple[object, Curves]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    [run] = client.search_runs([experiment.experiment_id])
    histories = {n: client.get_metric_history(run.info.run_id, n) for n in run.data.metrics}
    return run, {n: [(m.step, m.value) for m in h] for n, h in histories.items()}


def in_trackio(project: str) -> tuple[str, Curves]:
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs(project)
    found = defaultdict(list)
    for values in SQLiteStorage.get_logs(project, name):
        for key in values.keys() - {"timestamp", "step"}:
            found[key].append((values["step"], values[key]))
    return name, dict(found)


def assert_same_curves(given: Curves, expected: Curves) -> None:
    assert given.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in given[name]] == [step for step, _ in points], name
        values = [value for _, value in points]
        # TensorBoard's are float32.
        assert [value for _, value in given[name]] == pytest.approx(values, rel=1e-6), name


def test_a_resumed_run_goes_on_in_the_same_tracked_run(images, tmp_path, offline):
    run, options = tmp_path / "run", (*TRACKED, "--log-project", offline)
    with stopped_after(9):
        assert train(images, run, *options) == STOPPED
    noted = newest(run)["tracking"]
    assert (noted["project"], noted["name"]) == (offline, "run")
    assert train(images, run, *options, "--resume", "auto") == 0
    assert newest(run)["tracking"] == noted

    expected = in_tensorboard(run)
    assert [step for step, _ in expected["step/loss"]] == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert {"epoch/test_acc1", "epoch/train_loss", "step/lr"} <= expected.keys()
    tracked, curves = in_mlflow(offline)
    assert_same_curves(curves, expected)
    assert tracked.info.run_name == "run" and tracked.info.status == "FINISHED"
    assert tracked.data.params["lr"] == "0.01" and tracked.data.params["opt"] == "adamw"
    name, curves = in_trackio(offline)
    assert name == f"run-{noted['key'][:8]}"
    assert_same_curves(curves, expected)
    files = sorted((run / "wandb").glob(f"offline-run-*-{noted['key']}/*.wandb"))
    assert len(files) == 2
    first, second = map(in_wandb, files)
    both = {name: first.get(name, []) + second[name] for name in second}
    assert_same_curves(both, expected)

    # From an earlier checkpoint: the updates that come again are there already.
    again = ("--resume", run / "checkpoint-0002.pth", "--log-to", "mlflow", "trackio")
    assert train(images, run, "--log-project", offline, *map(str, again), "--lr", "0.02") == 0
    for _, curves in (in_mlflow(offline), in_trackio(offline)):
        steps = [step for step, _ in curves["step/loss"]]
        assert steps == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    tracked, _ = in_mlflow(offline)
    assert tracked.data.params["lr"] == "0.01" and tracked.data.tags["changed.lr"] == "0.02"


def test_which_tracked_run_a_session_belongs_to(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("training.tracking.Feeds", lambda *given: opened.append(given))

    def noted(earlier: dict | None, *options: str, is_main: bool = True) -> dict | None:
        config = load(["--data-path", "x", "--log-to", "wandb", *options])
        return Tracking(config, tmp_path / "run", earlier, is_main=is_main).noted

    first = noted(None)
    assert first["name"] == "run" and len(first["key"]) == 16
    assert not opened[-1][1].went_on
    assert noted(first) == first
    assert opened[-1][1].went_on
    for options in (("--log-name", "other"), ("--log-project", "other")):
        other = noted(first, *options)
        assert other["key"] != first["key"] and not opened[-1][1].went_on
    assert noted(None)["key"] != first["key"]
    assert noted(first | {"key": "../x' or"})["key"] != "../x' or"
    count = len(opened)
    assert noted(first, is_main=False) == first and opened[count:] == [()]
    untracked = Tracking(load(["--data-path", "x"]), tmp_path, None, is_main=True)
    assert untracked.noted is None and opened[-1] == ()
