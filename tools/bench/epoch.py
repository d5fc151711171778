"""configs/quickstart.yaml: an epoch, beside timm's loader, mixup and EMA in a plain loop; and the
whole run, from the start of its process to its end."""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

import engine
import main as main_module
import models
from augmentation.mixing import build_mixer
from augmentation.preprocessing import Preprocessing
from config import Config, load
from distributed.processes import Processes
from errors import UserError
from losses import CrossEntropy
from pipeline.dataset import Batch
from pipeline.sources.base import Source
from tools.bench.common import (
    MEAN,
    ROOT,
    STD,
    Rows,
    Workload,
    add_repeats,
    alone,
    bench_parser,
    compare,
    limit,
    run,
    surviving,
    synchronise,
)
from tools.bench.images import TimmDataset
from training.build import build_state, step_settings
from training.data import build_data, build_sets

CLASSES = 10
RECIPE = str(ROOT / "configs/quickstart.yaml")


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    toy = arguments.toy
    whole, epoch = partial(_whole_run, device, toy), partial(_epoch, arguments.repeats, device, toy)
    yield from surviving([("quickstart", whole), ("epoch", epoch)])


def _whole_run(device: torch.device, toy: bool) -> Rows:
    """main.py in a process of its own: how many images it trained on, in how long."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--config", RECIPE, "--device", device.type, "--output-dir", folder]
        start = time.perf_counter()
        if toy:  # in this process, which has imported all
            argv += ["--epochs", "1", "--warmup-epochs", "0", "--input-size", "8"]
            argv += ["--batch-size", "256"]
            code, said = main_module.main(argv), ""
        else:
            done = subprocess.run(
                [sys.executable, "main.py", *argv],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            code, said = done.returncode, done.stderr
        seconds = time.perf_counter() - start
        if code:
            raise UserError(f"the quickstart failed: {said[-500:]}")
        lines = (Path(folder) / "log.txt").read_text(encoding="utf-8").splitlines()
    epochs = list(map(json.loads, lines))
    images = epochs[-1]["update"] * load(argv).data.batch_size
    note = f"{seconds:.1f} s from the start of the process to its end"
    print(f"the quickstart: {note}")
    yield {
        "title": f"the whole quickstart, {len(epochs)} epochs",
        "ours": images / seconds,
        "repeats": 1,
        "seconds": seconds,
        "note": note,
        "limit": limit("its epochs alone", images / sum(e["epoch_seconds"] for e in epochs)),
    }


def _epoch(repeats: int, device: torch.device, toy: bool) -> Rows:
    """An epoch in turns with timm's parts."""
    config: Config = load(["--config", RECIPE])
    processes = Processes()
    preprocessing = Preprocessing(config.model.input_size, 1.0, "bicubic", MEAN, STD)
    data = build_data(config, processes, build_sets(config, processes), preprocessing, device)
    model = _model(config, device)
    state, _ = build_state(config, model, data, processes, device)
    settings = step_settings(config, processes, device, data, model)
    mixer = build_mixer(config.augment, CLASSES)
    steps = 2 if toy else data.steps

    def train(batches: Iterable[Batch]) -> int:
        state.progress.step = 0
        engine.train_one_epoch(
            state,
            CrossEntropy(config.loss.smoothing),
            itertools.islice(batches, steps),
            settings,
            steps=steps + 1,
            mixer=mixer,
        )
        synchronise(device)
        return steps * config.data.batch_size

    batch = next(iter(data.batches(0)))
    batch = batch._replace(images=settings.inputs(batch), targets=settings.place(batch.targets))
    resident = alone("its steps on one batch", lambda: train(itertools.repeat(batch)), repeats)
    title = "an epoch of the quickstart, against timm's parts in a plain loop"
    theirs = _timm_epoch(config, data.train.source, device, steps)
    bound = limit("its steps on one batch that stays on the device", resident["ours"])
    yield compare(title, lambda: train(data.batches(0)), theirs, repeats, bound)


def _model(config: Config, device: torch.device) -> nn.Module:
    options = config.model
    return models.build_model(
        options.model, CLASSES, input_size=options.input_size, drop_path=options.drop_path
    ).to(device)


def _timm_epoch(config: Config, source: Source, device: torch.device, steps: int) -> Workload:
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
        for images, targets in itertools.islice(batches, steps):
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
    augment = config.augment

    def read(index: int) -> tuple[Image.Image, int]:
        image, label = source.read(index)
        return Image.fromarray(np.asarray(image)).convert("RGB"), label

    return create_loader(
        TimmDataset(len(source), read),
        (3, *config.model.size),
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
