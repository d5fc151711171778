"""pipeline/progress.py: a bar on a terminal, nothing elsewhere."""

import io
import sys

import pytest

from pipeline.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("visible", [True, False])
def test_a_terminal_shows_how_far_it_is(monkeypatch, visible):
    monkeypatch.setattr(sys, "stdout", Terminal())
    bar = ProgressBar("cache", 8, initial=2, visible=visible)
    assert bar.visible is visible
    bar.to(8)
    bar.close()
    shown = sys.stdout.getvalue()
    assert ("cache:  25%" in shown and "2/8" in shown) is visible
    assert bool(shown) is visible


def test_a_file_stays_empty(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    bar = ProgressBar("cache", 8)
    bar.to(8)
    bar.close()
    assert not bar.visible and sys.stdout.getvalue() == ""
