"""A training step of DeiT and ResNet: the engine's, beside a plain loop over timm's model.

On CUDA also beside an eager fp16 loop that reads each loss, and the augmentation of the DeiT recipe
on the device. ``--variants`` compares ways to make a step with the engine's usual one instead.

A turn takes more than half a second, so that filling the device's queue doesn't count. ``host_ms``
is what the host needs to launch a step while the device is idle: near ``step_ms``, the host is the
limit.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import timm
import torch
from torch import nn

import engine
import models
from architectures.memory_format import to_channels_last
from architectures.summary import summarise
from augmentation.preprocessing import Preprocessing
from config import load
from distributed.processes import Processes
from losses import CrossEntropy
from pipeline.dataset import Batch
from tools.bench.augment import augmentation_row
from tools.bench.common import (
    MEAN,
    STD,
    Row,
    Rows,
    add_repeats,
    bench_parser,
    compare,
    run,
    surviving,
    synchronise,
)
from tools.bench.limits import launch_seconds, matmul_limit, matmul_rate, seconds_of
from tools.bench.variants import USUAL, VARIANTS, Variant, with_own_code
from training.build import build_state, step_settings
from training.data import build_data, build_sets

CUDA_BATCHES = {
    "deit_small_patch16_224": 256,
    "deit_base_patch16_224": 128,
    "deit_tiny_patch16_224": 256,
    "resnet50": 256,
}
CPU_BATCHES = {"deit_tiny_patch16_224": 8, "resnet50": 8}
TOY_BATCHES = {"deit_tiny_patch16_224": 1}
AUGMENTED = "deit_small_patch16_224"  # whose step the augmentation is compared with
CLASSES, SIZE = 1000, 224
TURN = 0.6  # seconds


class EngineSteps:
    """The engine's training of a model, step by step, on images of noise."""

    def __init__(
        self, name: str, batch: int, device: torch.device, variant: Variant = USUAL
    ) -> None:
        compiled = device.type == "cuda"
        argv = ["--model", name, "--data-set", "DIGITS", "--input-size", str(SIZE)]
        argv += ["--batch-size", str(batch), "--amp", "bf16" if compiled else "off"]
        argv += ["--no-model-ema", "--device", str(device), "--num-workers", "0"]
        argv += ["--no-repeated-aug", "--log-interval", "1000000", "--epochs", "1"]
        argv += ["--warmup-epochs", "0", "--drop-path", "0"]
        argv += ["--compile", *variant.options] if compiled else []
        config = load(argv)
        processes = Processes()
        preprocessing = Preprocessing(SIZE, 0.875, "bicubic", MEAN, STD)
        sets = build_sets(config, processes)
        data = build_data(config, processes, sets, preprocessing, device)
        self.device, self.batch, self.variant = device, batch, variant
        self.model = models.build_model(name, CLASSES, input_size=SIZE).to(device)
        if variant is not USUAL:
            with_own_code(self.model)
        variant.change(self.model)
        self.macs = summarise(self.model, SIZE).macs
        self.settings = step_settings(config, processes, device, data, self.model)
        if self.settings.channels_last:
            to_channels_last(self.model)
        self.state, _ = build_state(config, self.model, data, processes, device)
        self.images = torch.randn(batch, 3, SIZE, SIZE)
        self.targets = torch.randint(0, CLASSES, (batch,))
        if device.type == "cuda":
            self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()

    def run(self, steps: int) -> int:
        """Make ``steps`` steps; returns the images they took."""
        positions = torch.arange(self.batch)
        batch = Batch(self.images, self.targets, positions, positions, [])
        return self._train(itertools.repeat(batch, steps), steps)

    def host_seconds(self) -> float:
        """Seconds in which the host launches a step while the device is idle."""
        asked: list[float] = []

        def batches() -> Iterator[Batch]:
            positions = torch.arange(self.batch)
            for _ in range(2):
                asked.append(time.perf_counter())
                yield Batch(self.images, self.targets, positions, positions, [])
            asked.append(time.perf_counter())

        times = []
        for _ in range(5):
            asked.clear()
            synchronise(self.device)
            self._train(batches(), 2)
            # On CUDA the second batch is asked for before the first step, the third after it.
            times.append(asked[-1] - asked[-2])
        return statistics.median(times)

    def _train(self, batches: Iterator[Batch], steps: int) -> int:
        self.state.progress.step = 0
        with self.variant.surroundings():
            engine.train_one_epoch(
                self.state, CrossEntropy(0.1), batches, self.settings, steps=steps + 1
            )
        synchronise(self.device)
        return steps * self.batch


class PlainSteps:
    """A loop as people write it, on the images of ``ours``; ``read_loss``: of each step."""

    def __init__(
        self, model: nn.Module, ours: EngineSteps, amp: torch.dtype | None, *, read_loss: bool
    ) -> None:
        self.model, self.ours, self.amp, self.read_loss = model, ours, amp, read_loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.scaler = torch.amp.GradScaler(ours.device.type, enabled=amp == torch.float16)
        layout = torch.channels_last if ours.settings.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        self.layout = layout

    def run(self, steps: int) -> int:
        """Make ``steps`` steps; returns the images they took."""
        for _ in range(steps):
            self._launch()
        synchronise(self.ours.device)
        return steps * self.ours.batch

    def host_seconds(self) -> float:
        """Seconds in which the host launches a step while the device is idle."""
        return launch_seconds(self._launch, self.ours.device)

    def _launch(self) -> None:
        device = self.ours.device
        images = self.ours.images.to(device, non_blocking=True, memory_format=self.layout)
        targets = self.ours.targets.to(device, non_blocking=True)
        with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
            loss = self.criterion(self.model(images), targets)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.read_loss:
            loss.item()


def steps_per_turn(run_steps: Callable[[int], int], device: torch.device) -> int:
    """As many steps as take ``TURN`` on CUDA, and two on a CPU."""
    if device.type != "cuda":
        return 2
    seconds = seconds_of(lambda: run_steps(5), device, count=1) / 5
    return min(max(round(TURN / seconds), 10), 1000)


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    cuda = device.type == "cuda"
    batches = TOY_BATCHES if arguments.toy else CUDA_BATCHES if cuda else CPU_BATCHES
    repeats = arguments.repeats
    parts: list[tuple[str, Callable[[], Rows]]] = []
    if arguments.variants is None:
        small = 512 if arguments.toy else None
        rate = matmul_rate(device, torch.bfloat16 if cuda else torch.float32, small)
        for name in arguments.models or list(batches):
            batch = batches.get(name, 128 if cuda else 8)
            parts.append((name, partial(_rows_of, name, batch, device, rate, repeats)))
            if name == AUGMENTED or arguments.toy:
                parts.append(("augmentation", partial(_augmentation, name, batch, device, repeats)))
    else:
        for name in arguments.models or list(batches)[:1]:
            batch = batches.get(name, 128 if cuda else 8)
            for variant in arguments.variants or VARIANTS:
                rows = partial(_variant_row, name, batch, variant, device, repeats)
                parts.append((f"{name}, {variant}", rows))
    yield from surviving(parts)


def _rows_of(name: str, batch: int, device: torch.device, matmul: float, repeats: int) -> Rows:
    """A model's rows: on CUDA also against an eager loop."""
    cuda = device.type == "cuda"
    ours = EngineSteps(name, batch, device)
    timms = timm.create_model(name, num_classes=CLASSES).to(device)
    if cuda:
        timms = torch.compile(timms)
    theirs = PlainSteps(timms, ours, torch.bfloat16 if cuda else None, read_loss=False)
    how = "compiled bf16" if cuda else "float32"
    row = _compare(f"{name}, batch {batch}, {how}, against timm's model", ours, theirs, repeats)
    row["limit"] = matmul_limit(
        torch.bfloat16 if cuda else torch.float32, matmul, ours.macs, row["ours"]
    )
    yield row
    if cuda:
        del theirs, timms
        torch.cuda.empty_cache()
        eager = timm.create_model(name, num_classes=CLASSES).to(device)
        theirs = PlainSteps(eager, ours, torch.float16, read_loss=True)
        title = f"{name}, batch {batch}, against an eager fp16 loop that reads each loss"
        row = _compare(title, ours, theirs, repeats)
        row["limit"] = matmul_limit(torch.bfloat16, matmul, ours.macs, row["ours"])
        yield row


def _compare(title: str, ours: EngineSteps, theirs: EngineSteps | PlainSteps, repeats: int) -> Row:
    """Both in turns, with the time of a step and the host's share of it."""
    counts = [steps_per_turn(side.run, ours.device) for side in (ours, theirs)]
    row = compare(title, lambda: ours.run(counts[0]), lambda: theirs.run(counts[1]), repeats)
    if ours.device.type != "cuda":
        return row
    row["step_ms"] = {side: 1e3 * ours.batch / row[side] for side in ("ours", "theirs")}
    row["host_ms"] = {"ours": 1e3 * ours.host_seconds(), "theirs": 1e3 * theirs.host_seconds()}
    for side in ("ours", "theirs"):
        print(f"   {side}: step {row['step_ms'][side]:.2f} ms, host {row['host_ms'][side]:.2f} ms")
    return row


def _variant_row(name: str, batch: int, variant: str, device: torch.device, repeats: int) -> Rows:
    """A variant in turns with the engine's usual way."""
    changed = EngineSteps(name, batch, device, VARIANTS[variant])
    usual = EngineSteps(name, batch, device)
    title = f"{name}, batch {batch}, {variant}, against the engine's usual way"
    yield _compare(title, changed, usual, repeats)


def _augmentation(name: str, batch: int, device: torch.device, repeats: int) -> Rows:
    ours = EngineSteps(name, batch, device)
    count = steps_per_turn(ours.run, device)
    step = seconds_of(lambda: ours.run(count), device, count=1) / count
    yield augmentation_row(name, step, batch, SIZE, CLASSES, device, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("step", __doc__)
    parser.add_argument("--models", nargs="+", help="these alone")
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=VARIANTS,
        help="ways to make a step of the first model, or of --models (default: all of them)",
    )
    add_repeats(parser)
    return run("step", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
