"""The service under load, beside the same work without HTTP.

Clients over HTTP with real JPEG files, in turns with the same work in one process: decode and
transform in a pool of threads, then the model on a batch. Then a long run in which every tenth
request is malformed. The exit code is 1 where a request was answered wrongly.

The limit is the same work and, for each image, the CPU time of a server that takes in the same body
from the same clients and answers with a constant (``tools.bench.echo``).

On a busy machine whoever has more threads gets more of it: ``cpu_ratio``, the images for the same
CPU time of all processes, says more there than the rates.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import models
from distributed.liveness import cpu_seconds
from errors import UserError
from inference import Classifier
from pipeline.workers import keep_freed_memory
from tools.bench.common import (
    MEAN,
    ROOT,
    STD,
    Row,
    Rows,
    add_repeats,
    bench_parser,
    limit,
    record,
    summary,
)
from tools.bench.images import photographs
from tools.common import command, trained
from utils import cores

CLASSES = 1000
BATCH = 32  # of the model without HTTP
MODELS = {"resnet18": 224, "deit_small_patch16_224": 224, "deit_nano_patch4_32": 32}


def untrained(name: str, size: int, folder: Path) -> Path:
    """A checkpoint of a model that has learnt nothing: speed doesn't depend on it."""
    model = models.build_model(name, CLASSES, input_size=size, required=("input_size",))
    preprocessing = {
        "input_size": size,
        "crop_ratio": 0.875,
        "interpolation": "bicubic",
        "mean": list(MEAN),
        "std": list(STD),
    }
    content = {
        "config": {"model": name},
        "class_names": [f"class {number}" for number in range(CLASSES)],
        "preprocessing": preprocessing,
        "model": model.state_dict(),
    }
    path = folder / f"{name}.pth"
    torch.save(content, path)
    return path


@contextmanager
def started(module: str, *options: str) -> Iterator[tuple[str, int]]:
    """URL and process of the server ``python -m module options``, which prints its URL."""
    line = [sys.executable, "-m", module, *options]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise UserError(f"{module} did not start, see above")
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def family(process: int) -> list[int]:
    """A process and its children, their children too; Linux."""
    found = [process]
    for pid in found:  # grows meanwhile
        found += children(pid)
    return found


def children(process: int) -> list[int]:
    """Those of a process, as far as it runs; Linux."""
    try:
        return [
            int(child)
            for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def measure_clients(
    url: str, images: Path, clients: int, seconds: float, every: int = 0
) -> dict[str, Any]:
    """The figures of ``tools.serve.load`` in a process of its own."""
    line = [sys.executable, "-m", "tools.serve.load", url, str(images)]
    line += ["--clients", str(clients), "--seconds", str(seconds)]
    line += ["--malformed-every", str(every)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise UserError(f"the clients failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


class WithoutHttp:
    """The same work in this process."""

    def __init__(self, classifier: Classifier, paths: Sequence[Path], device: torch.device) -> None:
        self.classifier, self.device = classifier, device
        self.paths = [str(path) for path in paths]
        self.pool = ThreadPoolExecutor(torch.get_num_threads())
        self.batch = torch.stack([self._tensor(p) for p in (self.paths * BATCH)[:BATCH]])

    def whole(self, seconds: float) -> tuple[float, int]:
        """Images per second from files to answers, and how many they were."""
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            chunk = [self.paths[(count + i) % len(self.paths)] for i in range(BATCH)]
            self._answer(torch.stack(list(self.pool.map(self._tensor, chunk))))
            count += BATCH
        return count / (time.perf_counter() - start), count

    def forward(self, seconds: float) -> float:
        """Images per second of the model alone."""
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            self._answer(self.batch)
            count += BATCH
        return count / (time.perf_counter() - start)

    def _tensor(self, path: str) -> torch.Tensor:
        return self.classifier.transform(path)

    def _answer(self, images: torch.Tensor) -> None:
        trained.probabilities(self.classifier, images.to(self.device)).cpu()


class Turns:
    """Turns of the service, of the work without HTTP and of HTTP without the work.

    Args:
        service: URL and process.
        echo: those of ``tools.bench.echo``.
        images: folder of the JPEG files.
        clients: how many ask at a time.
    """

    def __init__(
        self, service: tuple[str, int], echo: tuple[str, int], images: Path, clients: int
    ) -> None:
        self.service, self.echo, self.images, self.clients = service, echo, images, clients
        names = ("ours", "theirs", "forward", "client_cores", "cpu_ratio", "echo", "echo_seconds")
        names += ("median_seconds", "p99_seconds")
        self.figures: dict[str, list[float]] = {name: [] for name in names}

    def take(self, bare: WithoutHttp, seconds: float, *, counts: bool) -> None:
        """One turn of ``seconds`` each; the first sets things up and doesn't count."""
        clients, served_cpu = self._asked(self.service, seconds)
        used = time.process_time()
        whole, count = bare.whole(seconds)
        bare_cpu = (time.process_time() - used) / count
        forward = bare.forward(seconds / 2)
        echo, echo_cpu = self._asked(self.echo, seconds / 2)
        if not counts:
            return
        self.figures["ours"].append(clients["images_per_second"])
        self.figures["theirs"].append(whole)
        self.figures["forward"].append(forward)
        self.figures["cpu_ratio"].append(bare_cpu / served_cpu)
        for name in ("client_cores", "median_seconds", "p99_seconds"):
            self.figures[name].append(clients[name])
        self.figures["echo"].append(echo["images_per_second"])
        self.figures["echo_seconds"].append(echo_cpu)

    def ask(self, seconds: float, malformed_every: int = 0) -> dict[str, Any]:
        """The clients' figures."""
        return measure_clients(self.service[0], self.images, self.clients, seconds, malformed_every)

    def _asked(self, server: tuple[str, int], seconds: float) -> tuple[dict[str, Any], float]:
        """The clients' figures, and the server's CPU time for an answer in seconds."""
        url, process = server
        used = sum(map(cpu_seconds, family(process)))
        figures = measure_clients(url, self.images, self.clients, seconds)
        used = sum(map(cpu_seconds, family(process))) - used
        return figures, used / figures["answered"]


def measure_model(
    name: str, paths: Sequence[Path], folder: Path, arguments: argparse.Namespace
) -> Row:
    """A model's row: the service against the work without HTTP, then the malformed run."""
    size = MODELS[name]
    checkpoint = untrained(name, size, folder)
    opened = argparse.Namespace(
        model=str(checkpoint), ema=False, device=arguments.device, plugin=[]
    )
    model = trained.open_model(opened)
    bare = WithoutHttp(model.classifier, paths, model.device)
    load = [os.getloadavg()[0]]
    options = ("--device", arguments.device, "--port", "0", "--timeout", "60")
    with (
        started("tools.serve", str(checkpoint), *options) as service,
        started("tools.bench.echo") as echo,
    ):
        turns = Turns(service, echo, paths[0].parent, arguments.clients)
        for turn in command.progress(range(-1, arguments.repeats), name):
            turns.take(bare, arguments.seconds if turn >= 0 else 2.0, counts=turn >= 0)
        malformed = turns.ask(arguments.long, malformed_every=10)
    load.append(os.getloadavg()[0])
    medians = {key: statistics.median(values) for key, values in turns.figures.items()}
    at_best = 1 / (1 / medians["theirs"] + medians["echo_seconds"] / cores())
    return {
        "title": f"{name}, {size}×{size}, {arguments.clients} clients",
        **summary(turns.figures["ours"], turns.figures["theirs"]),
        "limit": limit("the same work and a bare echo of the body", at_best),
        "echo_only": medians["echo"],
        "echo_cpu_seconds": medians["echo_seconds"],
        "forward_only": medians["forward"],
        "share_of_forward_only": medians["ours"] / medians["forward"],
        "cpu_ratio": medians["cpu_ratio"],
        "client_cores": medians["client_cores"],
        "median_seconds": medians["median_seconds"],
        "p99_seconds": max(turns.figures["p99_seconds"]),
        "load_average": load,
        "malformed_run": malformed,
    }


def measure(arguments: argparse.Namespace) -> Rows:
    """A row for each model."""
    torch.set_num_threads(cores())
    # Without it the work without HTTP is up to a fifth slower, by what the heap has seen before.
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = photographs(folder, arguments.images)
        for model in MODELS:
            if model in arguments.models:
                row = measure_model(model, paths, folder, arguments)
                print(_shown(row), flush=True)
                yield row


def _shown(row: Row) -> str:
    malformed = row["malformed_run"]
    return (
        f"{row['title']}: {row['ours']:.0f} against {row['theirs']:.0f} images/s, "
        f"{row['ratio']:.3f}× ({row['least']:.3f} to {row['most']:.3f}); model alone "
        f"{row['forward_only']:.0f}, bare HTTP {row['echo_only']:.0f}; at best "
        f"{row['limit']['value']:.0f}; for the same CPU time {row['cpu_ratio']:.2f}×; "
        f"clients used {row['client_cores']:.2f} cores, waited "
        f"{1000 * row['median_seconds']:.0f} ms, of a hundred one "
        f"{1000 * row['p99_seconds']:.0f} ms in the slowest turn; malformed run: "
        f"{malformed['answered']} answered, failed {malformed['failed']}, "
        f"refused {malformed['refused']}"
    )


def answered_well(row: Row) -> bool:
    """Whether all good requests were answered, and all malformed ones refused with a 4xx."""
    malformed = row["malformed_run"]
    refused_well = all(re.fullmatch("4..", status) for status in malformed["refused"])
    return not malformed["failed"] and refused_well


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a request was answered wrongly."""
    parser = bench_parser("serve", __doc__, device="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--images", default="", help="a folder of JPEG files")
    parser.add_argument("--clients", type=command.positive, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    parser.add_argument("--long", type=float, default=60.0, help="seconds of the malformed run")
    add_repeats(parser, default=5)

    def carry_out(arguments: argparse.Namespace) -> int:
        if arguments.toy:
            arguments.seconds = arguments.long = 1.0
        rows = record("serve", parser, arguments, measure(arguments))
        return 0 if all(map(answered_well, rows)) else 1

    return command.run(carry_out, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
