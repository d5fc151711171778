"""What all tests share: the repository on the path, one thread a process, quiet libraries."""

import logging
import os
import sys
from pathlib import Path

# Processes that the tests start take it over: with another number of threads sums are rounded
# differently. It is read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; it looks once, when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _own_messages():
    """A run's messages go to standard output; those of the next test don't."""
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
