"""1, 2, 4 and 8 training processes, as many as there are devices, each with its own batch."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from errors import UserError
from tools.bench.common import ROOT, Rows, add_repeats, bench_parser, run
from utils import cores


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """A row for each number of processes above one."""
    most = torch.cuda.device_count() if device.type == "cuda" else cores()
    worlds = [w for w in (1, 2, 4, 8) if w <= most]
    model = "deit_small_patch16_224" if device.type == "cuda" else "deit_nano_patch4_32"
    rates: dict[int, list[float]] = {world: [] for world in worlds}
    for _ in range(max(1, arguments.repeats // 3)):
        for world in worlds:
            rates[world].append(training_rate(world, model, device))
    alone = statistics.median(rates[1])
    for world in worlds[1:]:
        rate = statistics.median(rates[world])
        ratio = rate / (alone * world)
        print(f"{world} processes: {rate:.0f} images/s, {ratio:.0%} of {world} × one")
        yield {
            "title": f"{world} processes, {model}, against one process × {world}",
            "ours": rate,
            "theirs": alone * world,
            "ratio": ratio,
            "repeats": len(rates[world]),
        }


def training_rate(world: int, model: str, device: torch.device) -> float:
    """Images per second that a run of ``world`` processes reports at its end."""
    line = [sys.executable]
    if world > 1:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    size, batch = ("32", "32") if device.type == "cpu" else ("224", "256")
    line += ["main.py", "--data-set", "DIGITS", "--model", model, "--device", device.type]
    line += ["--input-size", size, "--batch-size", batch, "--epochs", "2", "--warmup-epochs", "0"]
    line += ["--no-tensorboard", "--no-model-ema"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*line, "--output-dir", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise UserError(f"a run of {world} processes failed: {done.stderr[-500:]}")
    reported = [x for x in done.stdout.splitlines() if "img/s" in x]
    return float(reported[-1].split(" img/s")[0].split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("scaling", __doc__)
    add_repeats(parser)
    return run("scaling", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
