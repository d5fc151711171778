"""What the benchmarks share: turns, physical limits, hardware and versions, the files of figures.

Each side runs once to warm up; then they take turns, and medians are compared, so that a busy
machine slows both alike. The figures go to benchmarks/NAME-DEVICE.json: an object whose ``rows``
are objects with

- ``title``, ``ours``, ``theirs``, ``ratio``, ``least``, ``most``, ``repeats``: see ``compare``;
- ``limit``: what the hardware allows at best, measured in the same run, see ``limit``. Without it
  the table says "not measured";
- ``note``: what else the table is to say of the row;
- ``command``, ``date``, ``surroundings``: how to measure it again; ``record`` adds them.

A benchmark adds what else it has measured under names of its own.
"""

import argparse
import gc
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
from errors import UserError, first_line
from tools.bench.figures import Row, read_figures
from tools.common import command

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "benchmarks"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Rows = Iterator[Row]
Workload = Callable[[], int]
"""Some work to be timed; returns the images it has dealt with."""


# --- the command line -----------------------------------------------------------------------------


def bench_parser(name: str, description: str, *, device: str = "auto") -> argparse.ArgumentParser:
    """The parser of ``python -m tools.bench NAME``, with the options that all of them have."""
    parser = command.parser(f"bench {name}", description)
    parser.add_argument("--device", default=device, help="as of main.py (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: benchmarks)")
    parser.add_argument(
        "--seconds-left", type=float, help="begin no row that would not be over by then"
    )
    parser.add_argument(
        "--toy", action="store_true", help="see in seconds that all runs; the figures mean nothing"
    )
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


def compare(
    title: str, ours: Workload, theirs: Workload, repeats: int, limit: Row | None = None
) -> Row:
    """Images per second of both, medians over ``repeats`` turns, and their ratio."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in command.progress(range(-1, repeats), title):
        for name, workload in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            images = workload()
            if turn >= 0:
                rates[name].append(images / (time.perf_counter() - start))
    row = {"title": title, **summary(rates["ours"], rates["theirs"])}
    if limit:
        row["limit"] = limit
    print(
        f"{title}: {row['ours']:.0f} against {row['theirs']:.0f} images/s, "
        f"{row['ratio']:.2f}× ({row['least']:.2f} to {row['most']:.2f})",
        flush=True,
    )
    return row


def alone(title: str, workload: Workload, repeats: int, limit: Row | None = None) -> Row:
    """Images per second of what has no counterpart, the median over ``repeats`` turns."""
    rates = []
    for turn in command.progress(range(-1, repeats), title):
        start = time.perf_counter()
        images = workload()
        if turn >= 0:
            rates.append(images / (time.perf_counter() - start))
    row = {"title": title, "ours": statistics.median(rates), "repeats": repeats}
    print(f"{title}: {row['ours']:.0f} images/s", flush=True)
    return {**row, "limit": limit} if limit else row


def surviving(parts: Iterable[tuple[str, Callable[[], Rows]]]) -> Rows:
    """The rows of all ``parts``, of which each has a name; one that fails doesn't stop the next.

    Raises UserError at the end if one has failed.
    """
    failed = []
    for name, rows in parts:
        try:
            yield from rows()
        except Exception as error:  # of any kind: the others are to be measured
            print(f"{name}: {type(error).__name__}: {first_line(error)}", flush=True)
            failed.append(name)
        gc.collect()  # compiled models hold themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}")


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


def limit(
    what: str, value: float, unit: str = "images/s", *, share: float | None = None
) -> dict[str, Any]:
    """What the hardware allows at best, for the field ``limit`` of a row.

    Args:
        what: the work that bounds it, as the table shows it: "decoding the same files, one core".
        value: what was measured of that work in this run.
        unit: of ``value``. In images/s it bounds ``ours``, and the table shows how much of it is
            reached.
        share: of the limit, 0 to 1, that ours reaches; needed where the unit is another one.
    """
    if unit != "images/s" and share is None:
        raise ValueError(f"a limit in {unit} needs a share")
    return {"what": what, "value": value, "unit": unit, "share": share}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- figures --------------------------------------------------------------------------------------


def record(
    name: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace, rows: Iterable[Row]
) -> list[Row]:
    """Write the figures of benchmark ``name`` after each row; returns the rows of this call.

    Rows of the same title are replaced, others stay; at the end also those go that the same command
    has once written under another title.
    """
    if arguments.toy:
        arguments.repeats = 1
    device = utils.pick_device(arguments.device)
    path = figures_path(name, device, arguments.out)
    line = command_line(name, parser, arguments)
    origin = {"command": line, "date": time.strftime("%Y-%m-%d")}
    done: list[Row] = []
    kept = read_figures(path) if path.exists() else []
    for row in _in_time(rows, arguments.seconds_left):
        # After each row: a run that is cut short keeps what it has measured.
        done.append({**row, **origin, "surroundings": surroundings(device)})
        kept = _with_row(kept, done[-1])
        write_figures(path, {"rows": kept})
    titles = [row["title"] for row in done]
    kept = [row for row in kept if row["command"] != line or row["title"] in titles]
    write_figures(path, {"rows": kept})
    print(f"wrote {path}")
    return done


def _in_time(rows: Iterable[Row], seconds: float | None) -> Rows:
    """``rows`` up to the last one that is expected to end within ``seconds``, if given."""
    start = begun = time.monotonic()
    longest = 0.0
    for row in rows:
        yield row
        now = time.monotonic()
        longest, begun = max(longest, now - begun), now
        if seconds is not None and now - start + longest > seconds:
            raise UserError(f"out of time after {now - start:.0f} s: what is left is not measured")


def _with_row(rows: list[Row], new: Row) -> list[Row]:
    """``rows`` with ``new`` in the place of the one of its title, else at the end."""
    titles = [row["title"] for row in rows]
    place = titles.index(new["title"]) if new["title"] in titles else len(rows)
    return [*rows[:place], new, *rows[place + 1 :]]


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
    """The command to measure again: the options that are off their defaults, but for
    where the figures go and how long it may take."""
    words = ["python -m tools.bench", name]
    for option, value in vars(arguments).items():
        if option in ("out", "seconds_left") or value == parser.get_default(option):
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
