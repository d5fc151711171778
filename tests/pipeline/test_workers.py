"""pipeline/workers.py: how many workers, and what they may hold in shared memory."""

import os
import subprocess
import sys
import time
import types

import pytest
from runs import ROOT

from pipeline.workers import (
    WorkerProgress,
    auto_num_workers,
    batch_bytes,
    free_shared_memory,
    most_workers,
    shared_memory_needed,
)


def test_auto_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert [auto_num_workers(n) for n in (1, 8, 128)] == [10, 8, 0]


def test_bytes_of_a_batch():
    # uint8 where the device augments, else float32, three channels.
    assert batch_bytes(256, (224, 192), by_batch=True) == 256 * 224 * 192 * 3
    assert batch_bytes(256, (224, 192), by_batch=False) == 256 * 224 * 192 * 3 * 4


def test_workers_are_counted_by_what_their_batches_need():
    # A container's 64 MiB: batches of 256 images of 224×224 bytes are 36.8 MiB.
    assert most_workers(256 * 224 * 224 * 3, 1, free=64 << 20) == 0
    # 2.5 batches per place: training's, and evaluation's of 1.5 times the size.
    assert most_workers(1_000, 1, free=21 * 2_500) == 10
    assert most_workers(1_000, 2, free=21 * 2_500) == 4
    assert most_workers(1_000, 8, free=1 << 40) > 1000


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("batch", [1_000, 999_999, 256 * 224 * 224 * 3])
def test_need_and_number_of_workers_agree(batch, processes):
    assert shared_memory_needed(batch, 0, processes) == 0
    for workers in (1, 3, 10):
        need = shared_memory_needed(batch, workers, processes)
        # Two batches ahead per worker and one that is handed over, 2.5 times as large.
        assert need == pytest.approx(2.5 * batch * (2 * workers + 1) * processes, abs=processes)
        assert most_workers(batch, processes, free=need) == workers
        assert most_workers(batch, processes, free=need - processes) == workers - 1


def test_free_shared_memory(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=123))
    assert free_shared_memory() == 123


def test_where_shared_memory_is_unknown_nothing_is_limited():
    assert free_shared_memory("/nowhere/at/all") is None
    assert most_workers(1_000, 1, free=None) is None


def test_progress_names_the_image_that_a_worker_is_at():
    """A worker that sleeps over an image is slow; one that is killed died over it."""
    progress = WorkerProgress(2)
    assert progress.slower_than(0) == progress.died_over() == []
    pids = []
    for worker in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        progress.of_worker(worker)
        progress.begin(10 + worker)
        if worker == 0:
            progress.end()
        time.sleep(300)
    deadline = time.monotonic() + 60
    while progress.slower_than(0.1) != [11] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert progress.slower_than(0.1) == [11] and progress.slower_than(100) == []
    assert progress.died_over() == []
    for pid in pids:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert progress.died_over() == [11]
    progress.clear()
    assert progress.slower_than(0) == progress.died_over() == []


FREED = """
import resource
import numpy as np
from pipeline.workers import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [np.ones(2 << 20, dtype=np.uint8) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
new_pages()
print(new_pages())
"""


def test_memory_that_was_freed_is_taken_again():
    """In a fresh process: the heap of one that ran other tests is in pieces."""
    found = subprocess.run(
        [sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 16_000  # 8 × 40 × 512 pages otherwise


def test_outside_of_a_worker_nothing_is_noted():
    progress = WorkerProgress(1)
    progress.begin(3)
    assert progress.slower_than(0) == []
