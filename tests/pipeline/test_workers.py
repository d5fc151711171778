"""pipeline/workers.py: how many workers, and what they may hold in shared memory."""

import multiprocessing
import os
import time
import types

import pytest
import torch

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
    assert batch_bytes(256, 224, by_batch=True) == 256 * 224 * 224 * 3
    assert batch_bytes(256, 224, by_batch=False) == 256 * 224 * 224 * 3 * 4


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


@pytest.mark.parametrize("num_workers", [1, 2])
def test_progress_names_the_image_that_a_worker_is_at(num_workers):
    """A worker that sleeps over an image is slow; one that is killed died over it."""
    progress = WorkerProgress(num_workers)
    assert progress.slower_than(0) == progress.died_over() == [] and not progress.some_died()
    loader = torch.utils.data.DataLoader(Sleeping(progress), num_workers=num_workers)
    batches = iter(loader)
    deadline = time.monotonic() + 60
    while len(progress.slower_than(0.1)) < num_workers and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sorted(progress.slower_than(0.1)) == list(range(num_workers))
    assert not progress.some_died()
    pids = [worker.pid for worker in multiprocessing.active_children()]
    progress.kill()
    for worker in multiprocessing.active_children():
        worker.join(60)
    assert len(pids) >= num_workers and progress.died_over() == []
    del batches


class Sleeping(torch.utils.data.Dataset):
    """Begins with an image and never gets done."""

    def __init__(self, progress: WorkerProgress) -> None:
        self.progress = progress

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.progress.begin(index)
        time.sleep(300)
        return index
