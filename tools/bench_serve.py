"""Measure the service against its model: ``python -m tools.bench_serve``.

Clients over HTTP with real JPEG files, in turns with the same work in one process: decode and
transform in a pool of threads, then the model on a batch. Rates are medians in pictures a second.
Then a long run in which every tenth request is malformed. The figures go to
benchmarks/serve-DEVICE.json.

On a busy machine whoever has more threads gets more of it: ``cpu_ratio``, the pictures for the same
CPU time, tells more there than the rates.
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
from errors import UserError
from inference import Classifier
from tools import command, trained
from tools.benchmark import FOLDER, ROOT, photographs, surroundings

CLASSES = 1000
BATCH = 32  # of the bare model
MODELS = (
    ("resnet18", 224),
    ("deit_small_patch16_224", 224),
    ("deit_nano_patch4_32", 32),
)


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("bench_serve", __doc__)
    known = [name for name, _ in MODELS]
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--device", default="cpu", help="as of main.py (default: cpu)")
    parser.add_argument("--pictures", default="", help="a folder of JPEG files")
    parser.add_argument("--clients", type=trained.positive, default=32)
    parser.add_argument("--repeats", type=trained.positive, default=5, help="turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    parser.add_argument("--long", type=float, default=60.0, help="seconds of the malformed run")
    parser.add_argument("--output", type=Path, help="default: benchmarks/serve-DEVICE.json")
    return parser


def untrained(name: str, size: int, folder: Path) -> Path:
    """A checkpoint of a model that has learnt nothing: speed doesn't depend on it."""
    model = models.build_model(name, CLASSES, input_size=size, required=("input_size",))
    preprocessing = {"input_size": size, "crop_ratio": 0.875, "interpolation": "bicubic",
                     "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip
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
def served(checkpoint: Path, device: str) -> Iterator[tuple[str, int]]:
    """URL and process of a service of ``checkpoint``, with its defaults."""
    line = [sys.executable, "-m", "tools.serve", str(checkpoint)]
    line += ["--device", device, "--port", "0", "--timeout", "60"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise UserError("the service did not start, see above")
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def cpu_seconds(process: int) -> float:
    """Seconds of a core that a process has used; Linux."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(url: str, pictures: Path, clients: int, seconds: float, every: int = 0) -> dict[str, Any]:
    """The figures of ``tools.serve.load`` in a process of its own."""
    line = [sys.executable, "-m", "tools.serve.load", url, str(pictures)]
    line += ["--clients", str(clients), "--seconds", str(seconds)]
    line += ["--malformed-every", str(every)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise UserError(f"the clients failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


class Bare:
    """The same work without HTTP."""

    def __init__(self, classifier: Classifier, paths: Sequence[Path], device: torch.device) -> None:
        self.classifier, self.device = classifier, device
        self.paths = [str(path) for path in paths]
        self.pool = ThreadPoolExecutor(torch.get_num_threads())
        self.batch = torch.stack([self._tensor(p) for p in (self.paths * BATCH)[:BATCH]])

    def whole(self, seconds: float) -> tuple[float, int]:
        """Pictures a second from files to answers, and how many they were."""
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            chunk = [self.paths[(count + i) % len(self.paths)] for i in range(BATCH)]
            self._answer(torch.stack(list(self.pool.map(self._tensor, chunk))))
            count += BATCH
        return count / (time.perf_counter() - start), count

    def forward(self, seconds: float) -> float:
        """Pictures a second of the model alone."""
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            self._answer(self.batch)
            count += BATCH
        return count / (time.perf_counter() - start)

    def _tensor(self, path: str) -> torch.Tensor:
        return trained.decoded(path, self.classifier)

    def _answer(self, images: torch.Tensor) -> None:
        trained.probabilities(self.classifier.model, images.to(self.device)).cpu()


def compare(
    name: str, size: int, paths: Sequence[Path], folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A row: the service's rate against the bare model's, in turns; then the malformed run."""
    checkpoint = untrained(name, size, folder)
    opened = argparse.Namespace(
        model=str(checkpoint), ema=False, device=arguments.device, plugin=[]
    )
    model = trained.open_model(opened)
    bare = Bare(model.classifier, paths, model.device)
    rates: dict[str, list[float]] = {"ours": [], "theirs": [], "forward": []}
    rates |= {"client_cores": [], "cpu_ratio": []}
    pictures, load = paths[0].parent, [os.getloadavg()[0]]
    with served(checkpoint, arguments.device) as (url, process):
        for turn in command.progress(range(-1, arguments.repeats), name):
            seconds = arguments.seconds if turn >= 0 else 2.0
            used = cpu_seconds(process)
            asked = ask(url, pictures, arguments.clients, seconds)
            served_cpu = (cpu_seconds(process) - used) / asked["answered"]
            used = time.process_time()
            whole, count = bare.whole(seconds)
            bare_cpu = (time.process_time() - used) / count
            forward = bare.forward(seconds / 2)
            if turn < 0:
                continue  # what is set up once isn't measured
            rates["ours"].append(asked["pictures_per_second"])
            rates["theirs"].append(whole)
            rates["forward"].append(forward)
            rates["cpu_ratio"].append(bare_cpu / served_cpu)
            rates["client_cores"].append(asked["client_cores"])
        long = ask(url, pictures, arguments.clients, arguments.long, every=10)
    load.append(os.getloadavg()[0])
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
    medians = {key: statistics.median(values) for key, values in rates.items()}
    row = {
        "title": f"{name}, {size}×{size}, {arguments.clients} clients",
        "ours": medians["ours"],
        "theirs": medians["theirs"],
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "repeats": arguments.repeats,
        "forward_only": medians["forward"],
        "share_of_forward_only": medians["ours"] / medians["forward"],
        "cpu_ratio": medians["cpu_ratio"],
        "client_cores": medians["client_cores"],
        "load_average": load,
        "malformed_run": long,
    }
    print(
        f"{row['title']}: {row['ours']:.0f} against {row['theirs']:.0f} pictures/s, "
        f"{row['ratio']:.3f}× ({row['least']:.3f} to {row['most']:.3f}); model alone "
        f"{row['forward_only']:.0f}; for the same CPU time {row['cpu_ratio']:.2f}×; "
        f"clients used {row['client_cores']:.2f} cores; "
        f"malformed run: {long['answered']} answered, failed {long['failed']}, "
        f"refused {long['refused']}", flush=True,
    )  # fmt: skip
    return row


def _run(arguments: argparse.Namespace) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    output = arguments.output or FOLDER / f"serve-{arguments.device.partition(':')[0]}.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = photographs(folder, arguments.pictures)
        rows = [
            compare(model, size, paths, folder, arguments)
            for model, size in MODELS
            if model in arguments.models
        ]
    content = {
        "command": " ".join(("python -m tools.bench_serve", *arguments.given)),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        "surroundings": surroundings(torch.device(arguments.device)),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    clean = all(
        not row["malformed_run"]["failed"]
        and all(re.fullmatch("4..", status) for status in row["malformed_run"]["refused"])
        for row in rows
    )
    return 0 if clean else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a request was answered wrongly."""
    parser = get_parser()
    parser.set_defaults(given=sys.argv[1:] if argv is None else list(argv))
    return command.run(_run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
