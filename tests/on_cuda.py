"""Runs on a CUDA card, for tests that need one; ``CUDA_TESTS_ON=cpu`` has them on the CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import at_update, logged, newest

import main

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else os.environ.get("CUDA_TESTS_ON", "")
needs_device = pytest.mark.skipif(not DEVICE, reason="needs CUDA")
on_card = pytest.mark.skipif(not ON_CUDA, reason="needs CUDA")
# For --deterministic; torch looks for it once in a process, at the first product of matrices.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def command(folder: Path, *more: str) -> list[str]:
    side = "16" if ON_CUDA else "8"
    argv = ["--data-set", "DIGITS", "--model", "deit_nano_patch4_32", "--input-size", side]
    argv += ["--device", DEVICE, "--batch-size", "64", "--epochs", "2", "--warmup-epochs", "1"]
    argv += ["--num-workers", "0", "--output-dir", str(folder), "--no-tensorboard"]
    return [*argv, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return newest(folder)["model"]


def trained(folder: Path, *more: str) -> dict:
    """The last record of a run that must end well, with finite weights and a loss that fell."""
    assert main.main(command(folder, *more)) == 0
    record = logged(folder)[-1]
    assert record["train_loss"] < 3.0
    assert all(w.isfinite().all() for w in weights(folder).values())
    return record


@contextmanager
def no_waits(first: int, last: int) -> Iterator[list[str]]:
    """Between two updates of a run, torch raises where the host would wait for the device; the
    modes that were set."""
    modes: list[str] = []

    def switch(mode: str) -> None:
        modes.append(mode)
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode(mode)

    try:
        with at_update(first, lambda: switch("error")), at_update(last, lambda: switch("default")):
            yield modes
    finally:
        switch("default")
