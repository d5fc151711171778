"""tools.summary: runs beside each other."""

import json
import statistics

import pytest

from tools import summary


def run(root, name, scores, **options):
    """A folder with the log of a run whose test_acc1 and test_loss are ``scores`` each epoch."""
    folder = root / name
    folder.mkdir()
    lines = [
        {"epoch": e, "train_loss": 1.0, "train_lr": 0.1, "test_acc1": a, "test_loss": loss}
        for e, (a, loss) in enumerate(scores, start=1)
    ]
    # An epoch without a validation.
    lines.insert(1, {"epoch": 2, "train_loss": 1.0})
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"lr": 0.1, "data_path": name, **options}
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in values.items()))
    return folder


SCORES = ([(50.0, 2.0), (70.0, 1.5)], [(80.0, 1.0), (60.0, 0.5)], [(55.0, 1.0), (75.0, 1.2)])


@pytest.fixture
def runs(tmp_path):
    return [run(tmp_path, f"fold-{i}", scores) for i, scores in enumerate(SCORES)]


def test_mean_and_standard_deviation_of_the_best_epochs(runs, capsys):
    assert summary.main([*map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["test_acc1"] for r in found["runs"]] == [70.0, 80.0, 75.0]
    assert found["summary"]["test_acc1"]["mean"] == pytest.approx(75.0)
    assert found["summary"]["test_acc1"]["std"] == pytest.approx(5.0)
    losses = found["summary"]["test_loss"]
    assert losses["mean"] == pytest.approx(statistics.fmean([1.5, 1.0, 1.2]))
    assert losses["std"] == pytest.approx(statistics.stdev([1.5, 1.0, 1.2]))
    assert found["differences"] == {} and "train_lr" not in found["summary"]


def test_another_metric_chooses_other_epochs(runs, capsys):
    assert summary.main([*map(str, runs), "--metric", "loss"]) == 0
    out = capsys.readouterr().out
    assert "test_loss            1 ± 0.5" in out and "fold-1  epoch 2  test_acc1 60" in out


def test_what_the_runs_differ_in_is_said(runs, tmp_path, capsys):
    other = run(tmp_path, "other", SCORES[0], lr=0.2)
    assert summary.main([*map(str, runs), str(other)]) == 0
    assert "warning: the runs differ in --lr: 0.1, 0.1, 0.1, 0.2" in capsys.readouterr().out
    assert summary.main([str(runs[0]), "--metric", "macro_f1"]) == 2
    assert "no epoch has a test_macro_f1; " in capsys.readouterr().err
    assert summary.main([str(runs[0]), "--metric", "quality"]) == 2
    error = capsys.readouterr().err
    assert "no epoch has a quality; there are " in error and "test_acc1" in error
    assert summary.main([str(tmp_path / "no")]) == 2
