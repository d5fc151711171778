"""What a device can do at best, measured: products of matrices and copies of memory."""

import statistics
import time
from collections.abc import Callable

import torch

from tools.bench.common import Row, limit, synchronise

Work = Callable[[], object]


def seconds_of(work: Work, device: torch.device, *, count: int = 20, turns: int = 3) -> float:
    """Seconds of ``work`` on an otherwise idle device: the median of ``turns`` times ``count``."""
    for _ in range(3):
        work()
    times = []
    for _ in range(turns):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronise(device)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def launch_seconds(work: Work, device: torch.device, turns: int = 5) -> float:
    """Seconds in which the host launches ``work`` on an idle device: a median, the rest not waited
    for."""
    times = []
    for _ in range(turns):
        synchronise(device)
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    synchronise(device)
    return statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a large product of matrices of ``dtype``.

    ``size``: rows and columns; by default 8192 on CUDA, 1024 elsewhere.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    count = 20 if device.type == "cuda" else 3
    return 2 * size**3 / seconds_of(lambda: a @ b, device, count=count)


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a copy within the device's memory, read and written ones together.

    ``size``: bytes copied; by default 2 GiB on CUDA, 128 MiB elsewhere, more than caches hold.
    """
    size = size or (2**31 if device.type == "cuda" else 2**27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    count = 20 if device.type == "cuda" else 3
    return 2 * size / seconds_of(lambda: target.copy_(source), device, count=count)


def matmul_limit(dtype: torch.dtype, rate: float, macs: int, images_per_second: float) -> Row:
    """The limit of a training step: ``rate`` of ``matmul_rate``, of which a step of ``macs``
    multiply-accumulates per image (forward; the backward pass takes twice as many) uses a part."""
    name = str(dtype).removeprefix("torch.")
    share = 6 * macs * images_per_second / rate
    return limit(f"{name} product of matrices", rate / 1e12, "TFLOP/s", share=share)
