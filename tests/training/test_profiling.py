"""--profile: the trace of so many updates, and a training that is the same to the last bit."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from disks import small_disk
from runs import assert_same_state, logged, newest, stopped_after, train

from outputs.files import Outputs
from training.profiling import Profiler

SHORT = ("--epochs", "1", "--warmup-epochs", "0", "--no-model-ema")


def traced(folder: Path, name: str = "profile") -> dict[str, list[str]]:
    """The names of operations in each trace, and the steps in it."""
    found = {}
    for path in (folder / name).glob("*"):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        found[path.name] = [str(e.get("name")) for e in events]
    return found


def steps(names: list[str]) -> int:
    return len({name for name in names if name.startswith("ProfilerStep#")})


def test_a_trace_of_some_updates_changes_nothing(images, tmp_path, capsys):
    assert train(images, tmp_path / "plain", *SHORT) == 0
    capsys.readouterr()
    assert train(images, tmp_path / "run", *SHORT, "--profile", "2") == 0
    out = capsys.readouterr().out
    assert_same_state(newest(tmp_path / "plain"), newest(tmp_path / "run"))
    assert logged(tmp_path / "plain") == logged(tmp_path / "run")
    # The last two of six updates: nearly five come before.
    [(name, names)] = traced(tmp_path / "run").items()
    assert name == "update-4.pt.trace.json.gz" and steps(names) == 2
    assert {"aten::addmm", "Optimizer.step#AdamW.step"} <= set(names)
    assert f"profile  {tmp_path}/run/profile/{name}: open it" in out
    assert "aten::" in out[out.index("profile  CPU time") :]


@pytest.mark.parametrize("room", [8, 4000])
def test_a_trace_that_a_disk_does_not_take(tmp_path, caplog, room):
    """torch says nothing of it, and gives a trace away once."""
    outputs = Outputs()
    with small_disk(tmp_path / "disk", room) as disk:
        profiler = Profiler(1, disk, torch.device("cpu"), outputs)
        with profiler.epoch(0, 2, last=True):
            for _ in range(2):
                torch.ones(9).sum()
                profiler.step()
        outputs.retry()
        outputs.close()
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        if room == 4000:
            assert list(traced(disk.parent, disk.name)) == ["update-1.pt.trace.json.gz"]
            assert not said
        else:
            assert not list(disk.iterdir())
            assert len(said) == 1 and said[0].endswith("the trace is lost, training goes on")
            assert "No such file" not in said[0]


def test_a_resumed_run_is_traced_up_to_the_end_of_the_epoch(images, tmp_path):
    with stopped_after(5):
        train(images, tmp_path, *SHORT)
    assert train(images, tmp_path, *SHORT, "--resume", "auto", "--profile", "100") == 0
    [(name, names)] = traced(tmp_path).items()
    assert name == "update-5.pt.trace.json.gz" and steps(names) == 1
    assert newest(tmp_path)["config"].get("profile") is None  # not a part of the recipe


@pytest.mark.parametrize(
    "updates, epochs, expected",
    [
        (2, (9, 9), ("update-5", 2)),
        (4, (9, 9), ("update-5", 4)),
        (8, (9, 9), ("update-10", 8)),
        (8, (3, 20), ("update-8", 8)),
        (8, (3,), ("update-0", 3)),
        (1, (1,), ("update-0", 1)),
        (0, (9,), None),
    ],
)
def test_which_updates_are_traced(tmp_path, updates, epochs, expected):
    profiler = Profiler(updates, tmp_path / "profile", torch.device("cpu"), Outputs())
    done = 0
    for number, count in enumerate(epochs, 1):
        with profiler.epoch(done, count, last=number == len(epochs)):
            for _ in range(count):
                torch.ones(2) + done
                done += 1
                profiler.step()
    found = {name.partition(".")[0]: steps(names) for name, names in traced(tmp_path).items()}
    assert found == (dict([expected]) if expected else {})
