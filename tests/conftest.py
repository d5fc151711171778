"""What all tests share: one thread per process, fresh random state, tiny images to train on."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

# Processes that the tests start inherit it: with another number of threads sums are rounded
# differently. torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# A shell ignores SIGINT for what it starts with &, nohup SIGHUP; what tests start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Imports and collection make millions of objects that stay: to look for garbage among them takes a
# third of their time.
gc.disable()
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; it reads this once, when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files of minutes: several processes share the files, and none is to be left alone with these.
LONGEST = {"test_run_with_submitit.py", "test_stopping.py", "test_learning.py", "test_wrapping.py"}
LONGEST |= {"test_rendezvous.py", "test_serve_command.py", "test_tune.py", "test_signals.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """From here on objects come and go; those of the imports are never looked at again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _own_messages():
    """A run sends all messages to standard output; the next test gets the usual handlers back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _fresh_generators():
    """Every test starts from the same random state."""
    import utils

    utils.seed_all(0)


@pytest.fixture(scope="session", autouse=True)
def draw_curves() -> Iterator[Callable]:
    """The function that draws curves.png, which takes most of the time of a tiny run.

    Runs don't call it but where a test says so with the fixture ``curves``.
    """
    import loggers

    usual = loggers.draw_curves
    with mock.patch.object(loggers, "draw_curves", lambda records, path, metric="": None):
        yield usual


@pytest.fixture
def curves(draw_curves, monkeypatch) -> None:
    """Runs of this test draw curves.png."""
    monkeypatch.setattr("loggers.draw_curves", draw_curves)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An image folder of 24 training and 8 validation images of three classes; not to be changed.

    The class "blue" has two validation images, the others three.
    """
    from tiny_images import image_folder

    root = image_folder(tmp_path_factory.mktemp("images"), {"train": 8, "val": 3})
    (root / "val" / "blue" / "2.png").unlink()
    return root
