"""An epoch of configs/quickstart.yaml, beside timm's loader, mixup and EMA in a plain loop."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

import engine
import models
from augmentation.mixing import build_mixer
from augmentation.transforms import Preprocessing
from config import Config, load
from distributed.processes import Processes
from losses import CrossEntropy
from pipeline.sources.base import Source
from tools.bench.common import (
    MEAN,
    ROOT,
    STD,
    Rows,
    Workload,
    add_repeats,
    bench_parser,
    compare,
    run,
    synchronise,
)
from tools.bench.images import TimmDataset
from training.build import build_state, step_settings
from training.data import build_data, build_sets

CLASSES = 10


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's row."""
    config: Config = load(["--config", str(ROOT / "configs/quickstart.yaml")])
    processes = Processes()
    preprocessing = Preprocessing(config.model.input_size, 1.0, "bicubic", MEAN, STD)
    data = build_data(config, processes, build_sets(config, processes), preprocessing, device)
    model = _model(config, device)
    state, _ = build_state(config, model, data, processes, device)
    settings = step_settings(config, processes, device, data, model)
    mixer = build_mixer(config.augment, CLASSES)

    def ours() -> int:
        state.progress.step = 0
        engine.train_one_epoch(
            state,
            CrossEntropy(config.loss.smoothing),
            data.batches(0),
            settings,
            steps=data.steps + 1,
            mixer=mixer,
        )
        synchronise(device)
        return data.steps * config.data.batch_size

    title = "an epoch of the quickstart, against timm's parts in a plain loop"
    yield compare(title, ours, _timm_epoch(config, data.train.source, device), arguments.repeats)


def _model(config: Config, device: torch.device) -> nn.Module:
    options = config.model
    return models.build_model(
        options.model, CLASSES, input_size=options.input_size, drop_path=options.drop_path
    ).to(device)


def _timm_epoch(config: Config, source: Source, device: torch.device) -> Workload:
    """The same model, images and recipe through timm's loader, mixup and EMA."""
    batches = _timm_loader(config, source)
    augment = config.augment
    mixup = None
    if augment.mixup > 0 or augment.cutmix > 0:
        mixup = Mixup(
            augment.mixup,
            augment.cutmix,
            label_smoothing=config.loss.smoothing,
            num_classes=CLASSES,
        )
    criterion = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=0.1)
    model = _model(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = ModelEmaV3(model, 0.999) if config.ema.model_ema else None

    def epoch() -> int:
        count = 0
        model.train()
        for images, targets in batches:
            images, targets = images.to(device), targets.to(device)
            if mixup:
                images, targets = mixup(images, targets)
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if average:
                average.update(model)
            count += len(images)
        synchronise(device)
        return count

    return epoch


def _timm_loader(config: Config, source: Source) -> Iterable[Any]:
    augment, size = config.augment, config.model.input_size

    def read(index: int) -> tuple[Image.Image, int]:
        image, label = source.read(index)
        return Image.fromarray(np.asarray(image)).convert("RGB"), label

    return create_loader(
        TimmDataset(len(source), read),
        (3, size, size),
        config.data.batch_size,
        is_training=True,
        mean=MEAN,
        std=STD,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
        auto_augment=augment.aa,
        color_jitter=None,
        re_prob=augment.reprob,
        re_mode=augment.remode,
        hflip=augment.hflip,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("epoch", __doc__)
    add_repeats(parser)
    return run("epoch", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
