"""States and batches for a few steps of the engine."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from augmentation.batch import BatchAugment
from augmentation.protocol import RGB, Form
from config import OptimOptions, ScheduleOptions
from optimization.ema import ModelEma
from optimization.optimizer import build_optimizer
from optimization.schedule import build_schedule
from optimization.state import Progress, TrainState
from pipeline.dataset import Batch


def make_state(
    model: nn.Module,
    *,
    opt: str = "adamw",
    lr: float = 1e-3,
    ema: bool = False,
    optim: dict[str, Any] | None = None,
) -> TrainState:
    """A state at a constant rate of ``lr``."""
    model.no_weight_decay = lambda: set()
    optimizer = build_optimizer(model, OptimOptions(opt=opt, **(optim or {})), lr=lr)
    constant = ScheduleOptions(sched="constant", warmup_epochs=0)
    schedule = build_schedule(constant, lr=lr, epochs=10, updates_per_epoch=20)
    average = ModelEma(model, 0.9) if ema else None
    return TrainState(model, optimizer, schedule, None, average, lambda m: m, Progress())


def in_batches(images: torch.Tensor, targets: torch.Tensor, size: int) -> list[Batch]:
    numbers = torch.arange(len(targets))
    return [
        Batch(*(column[i : i + size] for column in (images, targets, numbers, numbers)), [])
        for i in range(0, len(targets), size)
    ]


def batches_of_bytes(
    count: int, augment: BatchAugment, size: int = 6, side: int = 16, form: Form = RGB
) -> Iterator[Batch]:
    """uint8 or uint16 batches of square images with their plans."""
    rng = np.random.RandomState(0)
    for i in range(count):
        shape, kind = (size, form.channels, side, side), f"u{form.bit_depth // 8}"
        images = torch.from_numpy(rng.randint(0, form.levels + 1, shape, dtype=kind))
        positions = np.arange(i * size, (i + 1) * size)
        numbers = torch.from_numpy(positions)
        targets = torch.from_numpy(rng.randint(0, 4, size))
        yield Batch(images, targets, numbers, numbers, [], augment.plan(0, positions))
