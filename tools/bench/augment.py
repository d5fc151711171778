"""The augmentation of the DeiT recipe by the batch, on the device."""

import torch

from augmentation.batch import BatchAugment
from augmentation.mixing import build_mixer
from augmentation.preprocessing import Preprocessing
from config import AugmentOptions
from tools.bench.common import MEAN, STD, Row, alone, limit, synchronise
from tools.bench.limits import copy_rate

PLANS = 8  # batches with draws of their own


def augmentation_row(
    name: str,
    step_seconds: float,
    batch: int,
    size: int,
    classes: int,
    device: torch.device,
    repeats: int,
) -> Row:
    """Flips, RandAugment, normalisation, erasing and mixing of uint8 crops that lie on the device.

    Args:
        name: the model whose step takes ``step_seconds`` for the same ``batch``.
        size: side of the images, pixels.
        classes: of the targets.
    """
    options = AugmentOptions()
    augment = BatchAugment(Preprocessing(size, 0.875, "bicubic", MEAN, STD), options, 0)
    mixer = build_mixer(options, classes)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    images = images.permute(0, 3, 1, 2)  # as workers give them
    targets = torch.randint(0, classes, (batch,), device=device)
    positions = torch.arange(PLANS * batch).view(PLANS, batch).numpy()
    plans = [augment.plan(0, numbers) for numbers in positions]
    rounds = 10 if device.type == "cuda" else 1

    def work() -> int:
        for number in range(rounds * PLANS):
            plan = plans[number % PLANS]
            mixer(augment(images, plan), targets, number)
        synchronise(device)
        return rounds * PLANS * batch

    # At the least bytes are read and floats written, once.
    least = images.numel() * 5 / batch
    bound = copy_rate(device) / least
    title = f"augmentation of the DeiT recipe on the device, batch {batch}"
    row = alone(title, work, repeats, limit("bytes read, floats written once", bound))
    row["share_of_step"] = batch / row["ours"] / step_seconds
    row["note"] = f"{row['share_of_step']:.1%} of a step of {name}"
    print(f"   {row['note']}")
    return row
