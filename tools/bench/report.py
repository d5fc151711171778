"""Write BENCHMARKS.md from the figures in benchmarks/."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.common import FOLDER, ROOT
from tools.common import command
from utils import written_whole

# benchmark: title of its section, what ours is compared with
SECTIONS = {
    "loader": ("Photographs, DeiT recipe, 224×224", "timm's `create_transform`"),
    "cache": ("Small images, 32×32, one core", "timm's `create_loader`"),
    "step": ("A training step", "a plain loop"),
    "epoch": ("An epoch of the quickstart", "timm's parts in a plain loop"),
    "scaling": ("Several processes", "one process × N"),
    "serve": ("The service under 32 clients", "the same work in one process"),
}
HEAD = """# Benchmarks

Written by `python -m tools.bench report` from the figures in [benchmarks](benchmarks). Both
sides run in one process, in turns; rates are medians in images per second, the ratio is the median
of the turns' ratios, with the least and the greatest. A ratio below 1 is a loss, and stays in the
table.
"""
UNMEASURED = """
## Not measured

{names}. `.ci/gpu` runs the others and the CUDA tests on a machine with a card.
"""


def report(folder: Path = FOLDER) -> str:
    """The text of BENCHMARKS.md."""
    parts = [HEAD]
    for name, (title, other) in SECTIONS.items():
        for path in sorted(folder.glob(f"{name}-*.json")):
            parts.append(_section(title, other, _load(path)))
    for path in sorted(folder.glob("attention-*.json")):
        parts.append(_attention_section(_load(path)))
    # The loader decodes on the host.
    on_cuda = (*SECTIONS.keys() - {"loader"}, "attention")
    names = sorted(n for n in on_cuda if not (folder / f"{n}-cuda.json").exists())
    if names:
        parts.append(UNMEASURED.format(names=", ".join(f"{n} on CUDA" for n in names)))
    return "\n".join(parts)


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _section(title: str, other: str, content: dict[str, Any]) -> str:
    around = content["surroundings"]
    lines = [
        f"\n## {title}\n",
        f"`{content['command']}` on {around['hardware']}, {around['cores']} cores, Python "
        f"{around['python']}, torch {around['torch']}, torchvision {around['torchvision']}, timm "
        f"{around['timm']}, Pillow {around['pillow']}, {content['date']}.\n",
        f"| | ours | {other} | ratio | |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        spread = f"{row['least']:.2f} to {row['most']:.2f}, " if "least" in row else ""
        share = row.get("share_of_matmul_rate")
        extra = f", {share:.0%} of the card's matmul rate" if share else ""
        lines.append(
            f"| {row['title']} | {row['ours']:,.0f} | {row['theirs']:,.0f} | "
            f"{row['ratio']:.2f}× | {spread}{row['repeats']} turns{extra} |"
        )
    return "\n".join(lines) + "\n"


def _attention_section(results: list[dict[str, Any]]) -> str:
    lines = [
        "\n## CaiT's talking-heads attention\n",
        "`python -m tools.bench attention`: a training step of the whole model, ours and timm's.\n",
        "| model | | ours, ms | timm's, ms | ratio | memory of timm's |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        amp = "float32" if result["amp"] == "None" else result["amp"]
        compiled = ", compiled" if result["compile"] else ""
        ours, timms = (1000 * result["step_seconds"][name] for name in ("ours", "timm"))
        lines.append(
            f"| {result['model']} | batch {result['batch_size']}, {amp}{compiled}, "
            f"{result['hardware']}, torch {result['versions']['torch']} | "
            f"{ours:,.0f} | {timms:,.0f} | {result['times_faster']:.2f}× | "
            f"{result['share_of_timms_memory']:.0%} ({result['memory']}) |"
        )
    return "\n".join(lines) + "\n"


def _carry_out(arguments: argparse.Namespace) -> None:
    with written_whole(ROOT / "BENCHMARKS.md") as temporary:
        temporary.write_text(report(), encoding="utf-8")
    print("wrote BENCHMARKS.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_carry_out, command.parser("bench report", __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
