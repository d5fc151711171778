"""1, 2, 4 and 8 training processes, as many as there are devices, each with its own batch.

The limit is as many processes at once that don't exchange anything: what sharing the machine costs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from errors import UserError
from tools.bench.common import ROOT, Rows, add_repeats, bench_parser, limit, run
from utils import cores


def measure(arguments: argparse.Namespace, device: torch.device) -> Rows:
    """A row for each number of processes above one."""
    most = torch.cuda.device_count() if device.type == "cuda" else cores()
    worlds = [w for w in (2, 4, 8) if w <= most]
    model = "deit_small_patch16_224" if device.type == "cuda" else "deit_nano_patch4_32"
    repeats = max(1, arguments.repeats // 3)
    for world in worlds:
        rates: dict[str, list[float]] = {"together": [], "alone": [], "apart": []}
        for _ in range(repeats):
            rates["together"] += training_rates([world], model, device)
            rates["alone"] += training_rates([1], model, device)
            rates["apart"].append(sum(training_rates([1] * world, model, device)))
        middle = {name: statistics.median(values) for name, values in rates.items()}
        ratio = middle["together"] / (middle["alone"] * world)
        print(f"{world} processes: {middle['together']:.0f} images/s, {ratio:.0%} of {world} × one")
        yield {
            "title": f"{world} processes, {model}, against one process × {world}",
            "ours": middle["together"],
            "theirs": middle["alone"] * world,
            "ratio": ratio,
            "repeats": repeats,
            "limit": limit(f"{world} runs of one process at once", middle["apart"]),
        }


def training_rates(worlds: Sequence[int], model: str, device: torch.device) -> list[float]:
    """Images per second that runs report at their ends, which train at the same time.

    ``worlds``: the processes of each; on CUDA a device for each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number, world in enumerate(worlds):
            environment = {"OMP_NUM_THREADS": "1"}
            if device.type == "cuda":
                first = sum(worlds[:number])
                devices = map(str, range(first, first + world))
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            line = _command_line(world, model, device, f"{folder}/{number}")
            runs.append(
                subprocess.Popen(
                    line,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, **environment},
                )
            )
        said = [process.communicate()[0] for process in runs]
    for process, text in zip(runs, said, strict=True):
        if process.returncode:
            raise UserError(f"a run failed: {text[-500:]}")
    reported = [[x for x in text.splitlines() if "img/s" in x][-1] for text in said]
    return [float(line.split(" img/s")[0].split()[-1]) for line in reported]


def _command_line(world: int, model: str, device: torch.device, folder: str) -> list[str]:
    line = [sys.executable]
    if world > 1:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    size, batch = ("32", "32") if device.type == "cpu" else ("224", "256")
    line += ["main.py", "--data-set", "DIGITS", "--model", model, "--device", device.type]
    line += ["--input-size", size, "--batch-size", batch, "--epochs", "2", "--warmup-epochs", "0"]
    return [*line, "--no-tensorboard", "--no-model-ema", "--output-dir", folder]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = bench_parser("scaling", __doc__)
    add_repeats(parser)
    return run("scaling", measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
