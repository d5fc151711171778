"""Exchanges between processes, and the same calls in one process alone."""

import time
from pathlib import Path

import pytest
import torch
from runs import on_each_process
from torch import nn

from distributed.processes import (
    Processes,
    all_reduce_sum,
    any_process,
    barrier,
    broadcast_buffers,
    gather,
    main_process_first,
    on_main_process,
)
from errors import DataError, UserError

WORLD = 3


def on_all(folder: Path, work) -> list:
    """What ``work(processes)`` returns on each of three processes."""
    return on_each_process(folder, WORLD, lambda rank: work(Processes(rank, WORLD, rank, WORLD)))


def exchanges(processes: Processes) -> dict:
    rank = processes.rank
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    norm.num_batches_tracked.fill_(10 + rank)
    broadcast_buffers(norm)
    return {
        "sum": all_reduce_sum(torch.tensor([rank, 1])).tolist(),
        "gathered": gather({"rank": rank}),
        "any": [any_process(False), any_process(rank == 2), any_process(True)],
        "buffers": [norm.running_mean.tolist(), int(norm.num_batches_tracked)],
    }


def test_exchanges(tmp_path):
    one = {
        "sum": [0 + 1 + 2, 3],
        "gathered": [{"rank": rank} for rank in range(WORLD)],
        "any": [False, True, True],
        "buffers": [[0.0, 0.0], 10],
    }
    assert on_all(tmp_path, exchanges) == [one] * WORLD


def test_exchanges_of_one_process_alone():
    assert exchanges(Processes()) == {
        "sum": [0, 1],
        "gathered": [{"rank": 0}],
        "any": [False, False, True],
        "buffers": [[0.0, 0.0], 10],
    }
    barrier()
    with main_process_first(Processes()):
        pass
    assert Processes().is_main and not Processes().distributed
    with pytest.raises(DataError, match="no image"):
        on_main_process(Processes(), refuse)


def refuse() -> None:
    raise DataError("no image")


def test_an_error_of_the_main_process_is_everybodys(tmp_path):
    def work(processes: Processes) -> list[str]:
        try:
            on_main_process(processes, refuse)
        except UserError as error:
            return [type(error).__name__, str(error)]
        return []

    assert on_all(tmp_path, work) == [["DataError", "no image"]] * WORLD


def test_the_main_process_goes_first(tmp_path):
    file = tmp_path / "made"

    def work(processes: Processes) -> bool:
        with main_process_first(processes):
            if processes.is_main:
                time.sleep(0.3)
                file.write_text("whole")
            return file.exists()

    assert on_all(tmp_path, work) == [True] * WORLD
