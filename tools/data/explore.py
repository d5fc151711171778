"""Look at every image of a data set: report.html to read, report.json for programs.

    python -m tools.data explore --data-path pets --output-dir pets-report

Counts per class, sizes, colour modes, brightness, normalisation, damaged files, duplicates (files
or pixels that are equal to the last bit), and images that are in both training and validation.
Takes every data set that training does; a folder without val/ needs --val-fraction, as there.
"""

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from augmentation.protocol import Form
from checkpointing.files import MULTILABEL
from config import Config
from errors import UserError, first_names, shortened
from outputs.console import say
from outputs.names import chart_label
from pipeline.bands import shown
from pipeline.dataset import IMBALANCE, ImageDataset, findings
from tools.common import command, reading
from tools.common.page import Page
from tools.data.facts import (
    ImageFacts,
    measure_images,
    normalisation,
    recipe,
    write_options,
)
from tools.multilabel.co_occurrence import add_to_page, label_report

THUMBNAIL, ROW, MOST_CLASSES = 72, 10, 20  # pixels, images of a class, classes in the grid
SHOWN = 50  # rows of a table on the page; the JSON holds all
SMALL = 32  # pixels; an image with a shorter side is worth a look


# --- the report -----------------------------------------------------------------------------------


def part_report(dataset: ImageDataset, facts: Sequence[ImageFacts]) -> dict[str, Any]:
    """The report of one part, plain values."""
    good = [x for x in facts if not x.problem]
    labels = np.array([label for x in facts for label in x.labels], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(dataset.classes))
    return {
        "images": len(dataset),
        "read": len(facts),
        "classes": dict(zip(dataset.classes, counts.tolist(), strict=True)),
        "width": _spread([x.size[0] for x in good]),
        "height": _spread([x.size[1] for x in good]),
        "modes": _count(x.mode for x in good),
        "transparent": sum(x.transparent for x in good),
        "formats": _count(x.form for x in good),
        "brightness": _spread([_brightness(x) for x in good]),
        **normalisation(good),
        "damaged": [
            {"image": dataset.sample_id(x.index), "reason": x.problem} for x in facts if x.problem
        ],
        "duplicates": [
            {
                "images": [dataset.sample_id(x.index) for x in group],
                "classes": sorted({_named(dataset, x) for x in group}),
            }
            for group in _same(good)
        ],
    }


def _named(dataset: ImageDataset, x: ImageFacts) -> str:
    """The class of an image, or all its labels."""
    return " and ".join(dataset.classes[label] for label in x.labels) or "no label"


def _brightness(x: ImageFacts) -> float:
    return sum(x.mean) / len(x.mean)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    least, low, median, high, most = np.percentile(values, (0, 5, 50, 95, 100)).tolist()
    return {"min": least, "p5": low, "median": median, "p95": high, "max": most}


def _count(values: Any) -> dict[str, int]:
    return dict(collections.Counter(values).most_common())


def _same(facts: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    groups: dict[bytes, list[ImageFacts]] = {}
    for x in facts:
        groups.setdefault(x.digest, []).append(x)
    return [group for group in groups.values() if len(group) > 1]


def find_leak(
    parts: dict[str, ImageDataset], facts: dict[str, list[ImageFacts]]
) -> list[dict[str, Any]]:
    """Validation images that are in the training part too."""
    train = {x.digest: x for x in facts["train"] if not x.problem}
    return [
        {
            "train": parts["train"].sample_id(train[x.digest].index),
            "val": parts["val"].sample_id(x.index),
            "same_class": train[x.digest].labels == x.labels,
        }
        for x in facts["val"]
        if not x.problem and x.digest in train
    ]


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What is worth attention, in words."""
    found = []
    helps = "--sampler balanced, --class-weights balanced"
    if "labels" in report:
        helps = "--pos-weight balanced"
    for name, part in report["parts"].items():
        if part["damaged"]:
            found.append(
                f"{name}: {_images(len(part['damaged']))} can't be read; repair or remove, "
                "or train with --on-bad-image skip"
            )
        if groups := part["duplicates"]:
            extra = sum(len(g["images"]) - 1 for g in groups)
            found.append(f"{name}: {_images(extra)} too many, copies of others")
            if torn := sum(len(g["classes"]) > 1 for g in groups):
                how = "with different labels" if "labels" in report else "under more than one class"
                found.append(f"{name}: {_images(torn)} {how}")
        counts = part["classes"]
        if empty := [c for c, count in counts.items() if not count]:
            found.append(
                f"{name}: {len(empty)} classes without an image, {shortened(empty[0])} for one"
            )
        present = [count for count in counts.values() if count]
        if present and max(present) >= IMBALANCE * min(present):
            found.append(
                f"{name}: the largest class has {max(present) / min(present):.0f} times the "
                f"images of the smallest; see {helps}"
            )
        sides = [part[side]["min"] for side in ("width", "height") if part[side]]
        if sides and min(sides) < SMALL:
            found.append(f"{name}: the smallest side of an image is {min(sides):.0f} pixels")
    if leak := report["leak"]:
        found.append(
            f"{_images(len(leak))} of the validation part in the training part too: the accuracy "
            "will look better than it is"
        )
    return found


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


# --- the page -------------------------------------------------------------------------------------


def draw(
    report: dict[str, Any],
    parts: dict[str, ImageDataset],
    facts: dict[str, list[ImageFacts]],
    form: Form,
) -> Page:
    """The report as a page with charts and a grid of samples."""
    page = Page(f"Data set {report['data_set']}")
    if not report["warnings"]:
        page.text("Nothing unusual was found.")
    for line in report["warnings"]:
        page.text(line, warning=True)
    page.heading("Overview")
    rows = [
        (title, *(measure(part) for part in report["parts"].values()))
        for title, measure in _OVERVIEW
    ]
    page.table(("", *report["parts"]), rows)
    page.heading("Images per class")
    page.chart(_class_chart(report))
    if "labels" in report:
        add_to_page(page, report["labels"], parts["train"].classes)
    page.heading("Sizes and brightness")
    page.chart(_spread_chart(facts))
    page.heading("Samples of the training part")
    for name, row in _samples(parts["train"], facts["train"], report["background"], form):
        page.image(row, name)
    _add_lists(page, report)
    return page


def _range(values: dict[str, float], digits: int = 0) -> str:
    if not values:
        return "–"
    least, median, most = (f"{values[k]:.{digits}f}" for k in ("min", "median", "max"))
    return f"{least} to {most}, median {median}"


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "–"


_OVERVIEW = (
    ("images", lambda part: part["images"]),
    ("of which read", lambda part: part["read"]),
    ("classes", lambda part: len(part["classes"])),
    ("damaged", lambda part: len(part["damaged"])),
    ("copies of another", lambda p: sum(len(g["images"]) - 1 for g in p["duplicates"])),
    ("width, pixels", lambda part: _range(part["width"])),
    ("height, pixels", lambda part: _range(part["height"])),
    ("brightness, 0–1", lambda part: _range(part["brightness"], 2)),
    ("colour modes", lambda part: _shares(part["modes"])),
    ("with transparency", lambda part: part["transparent"]),
    ("formats", lambda part: _shares(part["formats"])),
    ("--mean", lambda part: " ".join(f"{x:.4f}" for x in part["mean"])),
    ("--std", lambda part: " ".join(f"{x:.4f}" for x in part["std"])),
)


def _class_chart(report: dict[str, Any]) -> Any:
    figure_module = command.require("matplotlib.figure", "matplotlib")
    names = list(report["parts"]["train"]["classes"])
    few = len(names) <= 60
    size = (8, max(2.0, 0.22 * len(names) + 1)) if few else (8, 3.5)
    axes = (figure := figure_module.Figure(figsize=size)).add_subplot()
    left = np.zeros(len(names))
    for part, color in (("train", "tab:blue"), ("val", "tab:orange")):
        counts = np.array(list(report["parts"][part]["classes"].values()), dtype=float)
        if few:
            axes.barh(range(len(names)), counts, left=left, color=color, label=part)
            left += counts
        else:
            axes.plot(np.sort(counts)[::-1], color=color, label=part)
    if few:
        axes.set_yticks(range(len(names)), [chart_label(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("images")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set(xlabel="classes, the largest first", ylabel="images", ylim=(0, None))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    return figure


def _spread_chart(facts: dict[str, list[ImageFacts]]) -> Any:
    figure_module = command.require("matplotlib.figure", "matplotlib")
    figure = figure_module.Figure(figsize=(11, 3))
    measures = (
        ("width, pixels", lambda x: x.size[0]),
        ("height, pixels", lambda x: x.size[1]),
        ("brightness", _brightness),
    )
    for place, (title, measure) in enumerate(measures, start=1):
        axes = figure.add_subplot(1, len(measures), place)
        values = {part: [measure(x) for x in some if not x.problem] for part, some in facts.items()}
        edges = np.histogram_bin_edges(sum(values.values(), []), bins=40)
        for part, color in (("train", "tab:blue"), ("val", "tab:orange")):
            axes.hist(values[part], bins=edges, color=color, alpha=0.6, label=part)
        axes.set_xlabel(title)
        if place == 1:
            axes.set_ylabel("images")
            axes.legend()
    return figure


def _samples(
    dataset: ImageDataset, facts: Sequence[ImageFacts], background: str, form: Form
) -> list[tuple[str, Image.Image]]:
    """A strip of thumbnails for each of at most ``MOST_CLASSES`` classes."""
    members: dict[int, list[int]] = {}
    for x in facts:
        if not x.problem:
            for label in x.labels:
                members.setdefault(label, []).append(x.index)
    labels = sorted(members)
    chosen = sorted({labels[round(i)] for i in np.linspace(0, len(labels) - 1, MOST_CLASSES)})
    strips = []
    for label in chosen:
        indices = members[label]
        places = np.linspace(0, len(indices) - 1, min(ROW, len(indices))).round().astype(int)
        strip = Image.new("RGB", (ROW * THUMBNAIL, THUMBNAIL), "white")
        for place, i in enumerate(places.tolist()):
            image = shown(dataset.source.open(indices[i]), form, background)
            image.thumbnail((THUMBNAIL - 2, THUMBNAIL - 2))
            strip.paste(image, (place * THUMBNAIL, 0))
        strips.append((f"{dataset.classes[label]} ({len(indices):,})", strip))
    return strips


def _add_lists(page: Page, report: dict[str, Any]) -> None:
    for name, part in report["parts"].items():
        damaged = [(x["image"], x["reason"]) for x in part["damaged"]]
        _add_list(page, f"Damaged images of {name}", ("image", "reason"), damaged)
        copies = [
            (first_names(g["images"], 6), len(g["images"]), first_names(g["classes"], 6))
            for g in part["duplicates"]
        ]
        _add_list(page, f"Equal images of {name}", ("images", "copies", "classes"), copies)
    leak = [(x["val"], x["train"], "yes" if x["same_class"] else "no") for x in report["leak"]]
    _add_list(page, "In both parts", ("validation", "training", "same class"), leak)


def _add_list(page: Page, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if rows:
        page.heading(title)
        page.table(header, rows[:SHOWN])
        if len(rows) > SHOWN:
            page.text(f"{len(rows) - SHOWN:,} more are in report.json.")


# --- the command ----------------------------------------------------------------------------------


def explore(config: Config, folder: Path, limit: int | None) -> dict[str, Any]:
    """Write the report of ``config``'s data set to ``folder``; returns it."""
    parts = reading.parts(config)
    background, form = config.data.background, Form(config.model.in_chans, config.data.bit_depth)
    facts = {n: measure_images(d, n, limit, background, form) for n, d in parts.items()}
    if not any(not x.problem for x in facts["train"]):
        raise UserError(f"no training image can be read, the first: {facts['train'][0].problem}")
    report: dict[str, Any] = {
        "data_set": f"{config.data.data_set} {config.data.data_path}".strip(),
        "background": background,
        "parts": {name: part_report(parts[name], some) for name, some in facts.items()},
        "leak": find_leak(parts, facts),
    }
    if config.data.task == MULTILABEL:
        report["labels"] = {
            name: label_report([x.labels for x in some], parts[name].classes)
            for name, some in facts.items()
        }
    report["warnings"] = findings(*parts.values()) + warnings_of(report)
    draw(report, parts, facts, form).write(folder / "report.html")
    command.write_text(
        folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    )
    line = write_options(folder, recipe(config, report["parts"]["train"]))
    say(f"normalisation: {line}")
    return report


def _carry_out(arguments: argparse.Namespace) -> None:
    config = arguments.config
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError("--limit: must be at least 1")
    folder = Path(config.run.output_dir or "output/explore").expanduser()
    report = explore(config, folder, arguments.limit)
    for name, part in report["parts"].items():
        print(
            f"{name}: {part['read']} of {part['images']} images read, "
            f"{len(part['classes'])} classes"
        )
    for line in report["warnings"]:
        say(f"warning: {line}")
    say(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.run_parser("data explore", __doc__)
    arguments.add_argument(
        "--limit", type=int, metavar="N", help="read N images of each part, evenly spread"
    )
    return command.run(_carry_out, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
