"""Write BENCHMARKS.md from the figures in benchmarks/."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.bench.common import FOLDER, ROOT
from tools.bench.figures import Row, limit_text, read_figures
from tools.common import command
from utils import written_whole

# benchmark: title of its section, what ours is compared with
SECTIONS = {
    "loader": ("Photographs, DeiT recipe, 224×224", "timm's `create_transform`"),
    "cache": ("Images from memory (32×32) and from disk, one core", "timm's `create_loader`"),
    "step": ("A training step", "a plain loop"),
    "attention": ("CaiT's talking-heads attention: a training step", "timm's model"),
    "epoch": ("An epoch of the quickstart", "timm's parts in a plain loop"),
    "scaling": ("Several processes", "one process × N"),
    "scan": ("Finding the images of a large set", "the other library"),
    "serve": ("The service under 32 clients", "the same work in one process"),
}
HEAD = """# Benchmarks

Written by `python -m tools.bench report` from the figures in [benchmarks](benchmarks). Both
sides run in one process, in turns; rates are medians in images per second, the ratio is the median
of the turns' ratios, with the least and the greatest. A ratio below 1 is a loss, and stays in the
table. The limit is what the hardware allows at best, measured in the same run; in brackets, how
much of it ours reaches. The last column is the number of the command below the table.
"""
UNMEASURED = """
## Not measured

{names}. `.ci/gpu` measures all and runs the CUDA tests on a machine with a card.
"""


def report(folder: Path = FOLDER) -> str:
    """The text of BENCHMARKS.md."""
    parts = [HEAD]
    for name, (title, other) in SECTIONS.items():
        files = [read_figures(path) for path in sorted(folder.glob(f"{name}-*.json"))]
        if files:
            parts.append(_section(title, other, files))
    # These are work of the host.
    names = [n for n in sorted(SECTIONS.keys() - {"loader", "scan"}) if not _measured(folder, n)]
    if names:
        parts.append(UNMEASURED.format(names=", ".join(f"{n} on CUDA" for n in names)))
    return "\n".join(parts)


def _measured(folder: Path, name: str) -> bool:
    return (folder / f"{name}-cuda.json").exists()


def _section(title: str, other: str, files: Sequence[Sequence[Row]]) -> str:
    """A table for each file, and below it where its rows come from."""
    lines = [f"\n## {title}"]
    for rows in files:
        origins = list(dict.fromkeys(map(_origin, rows)))
        lines += [
            "",
            f"| | ours | {other} | ratio | turns | limit | |",
            "|---|---|---|---|---|---|---|",
            *(_table_row(row, 1 + origins.index(_origin(row))) for row in rows),
            "",
            *(f"{number}. {origin}" for number, origin in enumerate(origins, 1)),
        ]
    return "\n".join(lines) + "\n"


def _table_row(row: Row, number: int) -> str:
    turns = f"{row['repeats']}"
    if "least" in row:
        turns += f", {row['least']:.2f} to {row['most']:.2f}"
    title = f"{row['title']}; {row['note']}" if "note" in row else row["title"]
    cells = (
        title,
        f"{row['ours']:,.0f}",
        f"{row['theirs']:,.0f}" if "theirs" in row else "",
        f"{row['ratio']:.2f}×" if "ratio" in row else "",
        turns,
        limit_text(row),
        str(number),
    )
    return f"| {' | '.join(cells)} |"


def _origin(row: Row) -> str:
    """How a row was measured: command, date, hardware, versions."""
    around = row["surroundings"]
    names = ("torch", "torchvision", "timm", "pillow")
    versions = ", ".join(f"{name} {around[name]}" for name in names if name in around)
    cores = f", {around['cores']} cores" if "cores" in around else ""
    threads = ""
    if "threads" in around:
        threads = f", {around['threads']} thread{'s' * (around['threads'] > 1)}"
    python = f"Python {around['python']}, " if "python" in around else ""
    return (
        f"`{row['command']}`, {row['date']}: {around['hardware']}{cores}{threads}, "
        f"{python}{versions}"
    )


def _carry_out(arguments: argparse.Namespace) -> None:
    with written_whole(ROOT / "BENCHMARKS.md") as temporary:
        temporary.write_text(report(), encoding="utf-8")
    print("wrote BENCHMARKS.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_carry_out, command.parser("bench report", __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
