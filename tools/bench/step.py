"""A training step of DeiT and ResNet: the engine's, beside a plain loop over timm's model."""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import timm
import torch
from torch import nn

import engine
import models
from architectures.summary import summarise
from augmentation.transforms import Preprocessing
from config import load
from distributed.processes import Processes
from losses import CrossEntropy
from pipeline.dataset import Batch
from tools.bench.common import MEAN, STD, Rows, add_repeats, bench_parser, compare, run, synchronise
from training.build import build_state, step_settings
from training.data import build_data, build_sets

CUDA_BATCHES = {
    "deit_small_patch16_224": 256,
    "deit_base_patch16_224": 128,
    "deit_tiny_patch16_224": 256,
    "resnet50": 256,
}
CPU_BATCHES = {"deit_tiny_patch16_224": 8, "resnet50": 8}
CLASSES, SIZE = 1000, 224
Steps = Callable[[int], int]
"""Makes so many steps; returns the images they took."""


class EngineSteps:
    """The engine's training of a model, step by step, on images of noise."""

    def __init__(self, model: str, batch: int, device: torch.device) -> None:
        compiled = device.type == "cuda"
        argv = ["--model", model, "--data-set", "DIGITS", "--input-size", str(SIZE)]
        argv += ["--batch-size", str(batch), "--amp", "bf16" if compiled else "off"]
        argv += ["--no-model-ema", "--device", str(device), "--num-workers", "0"]
        argv += ["--no-repeated-aug", "--log-interval", "1000", "--epochs", "1"]
        argv += ["--warmup-epochs", "0", "--drop-path", "0", *(["--compile"] if compiled else [])]
        config = load(argv)
        processes = Processes()
        preprocessing = Preprocessing(SIZE, 0.875, "bicubic", MEAN, STD)
        sets = build_sets(config, processes)
        data = build_data(config, processes, sets, preprocessing, device)
        self.device, self.batch = device, batch
        self.model = models.build_model(model, CLASSES, input_size=SIZE).to(device)
        self.state, _ = build_state(config, self.model, data, processes, device)
        self.settings = step_settings(config, processes, device, data, self.model)
        self.images = torch.randn(batch, 3, SIZE, SIZE)
        self.targets = torch.randint(0, CLASSES, (batch,))
        if device.type == "cuda":
            self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()

    def run(self, steps: int) -> int:
        """Make ``steps`` steps; returns the images they took."""
        positions = torch.arange(self.batch)
        batch = Batch(self.images, self.targets, positions, positions, [])
        self.state.progress.step = 0
        engine.train_one_epoch(
            self.state,
            CrossEntropy(0.1),
            itertools.repeat(batch, steps),
            self.settings,
            steps=steps + 1,
        )
        synchronise(self.device)
        return steps * self.batch


def plain_loop(
    model: nn.Module, ours: EngineSteps, *, amp: torch.dtype | None, read_loss: bool
) -> Steps:
    """A loop as people write it, on the images of ``ours``; ``read_loss``: of each step."""
    device = ours.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    def steps_of(steps: int) -> int:
        for _ in range(steps):
            images = ours.images.to(device, non_blocking=True)
            targets = ours.targets.to(device, non_blocking=True)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = criterion(model(images), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if read_loss:
                loss.item()
        synchronise(device)
        return steps * ours.batch

    return steps_of


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """The benchmark's rows."""
    cuda = device.type == "cuda"
    batches = CUDA_BATCHES if cuda else CPU_BATCHES
    matmul = matmul_rate(device) if cuda else None
    for name in arguments.models or list(batches):
        batch = batches.get(name, 128 if cuda else 8)
        yield from _rows_of(name, batch, device, matmul, arguments.repeats)
        if cuda:
            torch.cuda.empty_cache()


def _rows_of(
    name: str, batch: int, device: torch.device, matmul: float | None, repeats: int
) -> Rows:
    """A model's rows: on CUDA also against an eager loop."""
    cuda = device.type == "cuda"
    steps = 20 if cuda else 2
    ours = EngineSteps(name, batch, device)
    timms = timm.create_model(name, num_classes=CLASSES).to(device)
    if cuda:
        timms = torch.compile(timms)
    theirs = plain_loop(timms, ours, amp=torch.bfloat16 if cuda else None, read_loss=False)
    row = compare(
        f"{name}, batch {batch}, {'compiled bf16' if cuda else 'float32'}, against timm's "
        "model in the same kind of loop",
        lambda: ours.run(steps),
        lambda: theirs(steps),
        repeats,
    )
    if matmul:
        row["matmul_flops"] = matmul
        row["share_of_matmul_rate"] = 6 * summarise(ours.model, SIZE).macs * row["ours"] / matmul
        print(
            f"   {row['share_of_matmul_rate']:.0%} of the measured {matmul / 1e12:.0f} TFLOP/s "
            "of a matrix product"
        )
    yield row
    if cuda:
        del theirs, timms
        torch.cuda.empty_cache()
        eager = timm.create_model(name, num_classes=CLASSES).to(device)
        eager_loop = plain_loop(eager, ours, amp=torch.float16, read_loss=True)
        yield compare(
            f"{name}, batch {batch}, against an eager fp16 loop that reads each loss",
            lambda: ours.run(steps),
            lambda: eager_loop(steps),
            repeats,
        )


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations per second of a large bf16 matrix product, measured."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    synchronise(device)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronise(device)
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("step", __doc__)
    parser.add_argument("--models", nargs="+", help="these alone")
    add_repeats(parser)
    return run("step", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
