"""What the benchmarks share: turns, hardware and versions, and the files of figures.

Each side runs once to warm up; then they take turns, and medians are compared, so that a busy
machine slows both alike. The figures go to benchmarks/NAME-DEVICE.json.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image

import utils
from tools.common import command

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "benchmarks"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Row = dict[str, Any]
Rows = Iterator[Row]
Workload = Callable[[], int]
"""Some work to be timed; returns the images it has dealt with."""


# --- the command line -----------------------------------------------------------------------------


def bench_parser(name: str, description: str, *, device: str = "auto") -> argparse.ArgumentParser:
    """The parser of ``python -m tools.bench NAME``, with the options that all of them have."""
    parser = command.parser(f"bench {name}", description)
    parser.add_argument("--device", default=device, help="as of main.py (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: benchmarks)")
    return parser


def add_repeats(parser: argparse.ArgumentParser, default: int = 9) -> None:
    """``--repeats``."""
    parser.add_argument(
        "--repeats", type=command.positive, default=default, help="turns (default: %(default)s)"
    )


def run(
    name: str,
    measure: Callable[[argparse.Namespace, torch.device], Rows],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Carry out benchmark ``name`` and write its figures; returns the exit code."""

    def carry_out(arguments: argparse.Namespace) -> None:
        device = utils.pick_device(arguments.device)
        record(name, parser, arguments, measure(arguments, device))

    return command.run(carry_out, parser, argv)


# --- measuring ------------------------------------------------------------------------------------


def compare(title: str, ours: Workload, theirs: Workload, repeats: int) -> Row:
    """Images per second of both, medians over ``repeats`` turns, and their ratio."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in command.progress(range(-1, repeats), title):
        for name, workload in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            images = workload()
            if turn >= 0:
                rates[name].append(images / (time.perf_counter() - start))
    row = {"title": title, **summary(rates["ours"], rates["theirs"])}
    print(
        f"{title}: {row['ours']:.0f} against {row['theirs']:.0f} images/s, "
        f"{row['ratio']:.2f}× ({row['least']:.2f} to {row['most']:.2f})",
        flush=True,
    )
    return row


def summary(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Median rates, and the median, least and greatest ratio of the turns."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "repeats": len(ratios),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- figures --------------------------------------------------------------------------------------


def record(
    name: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace, rows: Iterable[Row]
) -> list[Row]:
    """Write the figures of benchmark ``name`` after each row; returns all rows."""
    device = utils.pick_device(arguments.device)
    done: list[Row] = []
    content = {
        "command": command_line(name, parser, arguments),
        "date": time.strftime("%Y-%m-%d"),
        "rows": done,
        "surroundings": surroundings(device),
    }
    path = figures_path(name, device, arguments.out)
    for row in rows:
        # After each row: a run that is cut short keeps what it has measured.
        done.append(row)
        write_figures(path, content)
    print(f"wrote {path}")
    return done


def figures_path(name: str, device: torch.device, folder: Path | None) -> Path:
    """The file of a benchmark's figures."""
    return (folder or FOLDER) / f"{name}-{device.type}.json"


def write_figures(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with utils.written_whole(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def command_line(name: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The command to measure again: the options that are off their defaults, but for ``--out``."""
    words = ["python -m tools.bench", name]
    for option, value in vars(arguments).items():
        if option == "out" or value == parser.get_default(option):
            continue
        words.append(f"--{option.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    cuda = device.type == "cuda"
    versions = {m.__name__: str(m.__version__) for m in (torch, torchvision, timm, np)}
    return {
        "hardware": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": utils.cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "pillow": Image.__version__,
        **versions,
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
