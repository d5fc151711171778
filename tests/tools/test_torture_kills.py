"""What ``python -m tools.torture kills`` and ``writes`` put in the place of something else."""

import inspect

import loggers
from tools.torture import processes


def test_what_stands_in_for_the_chart_takes_what_the_chart_takes(tmp_path, monkeypatch):
    real = inspect.signature(loggers.draw_curves)
    monkeypatch.setattr("loggers.draw_curves", loggers.draw_curves)  # put back in the end
    processes.plain_curves()
    given = dict.fromkeys(real.parameters, tmp_path / "curves.png")
    loggers.draw_curves(*given.values())
    assert (tmp_path / "curves.png").read_bytes() == b"curves"
