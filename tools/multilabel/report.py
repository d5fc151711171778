"""The report of a multi-label model: a page, JSON, CSV and the curves."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from errors import without_surrogates
from outputs.names import any_glyphs, csv_cell
from pipeline.dataset import ImageDataset
from tools.common import command
from tools.common.answers import (
    THUMBNAIL,
    Answers,
    begun_page,
    diagnosis,
    reliability_chart,
    thumbnail,
)
from tools.common.page import Page
from tools.multilabel.charts import CURVES, curves_chart, precisions_chart
from tools.multilabel.figures import figures, hardest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns of classes.csv and of the page's table: key, and what the page calls it.
_COLUMNS = {
    "class": "class",
    "images": "images",
    "predicted": "found",
    "average_precision": "average precision",
    "threshold": "threshold",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "f1_at_half": "F1 at 0.5",
    "best_threshold": "best threshold here",
    "best_f1": "F1 there",
}


class Measured(NamedTuple):
    """A multi-label model's answers and what they are judged by."""

    answers: Answers
    thresholds: np.ndarray
    """(C,) probabilities from which a label is there."""
    dataset: ImageDataset


def write(
    folder: Path,
    source: str,
    measured: Measured,
    *,
    most_mistakes: int,
    log: Path | None,
) -> dict[str, Any]:
    """Write report.html, report.json, classes.csv and curves.png; returns the JSON's content.

    ``source`` names the model, ``log`` is the run's log.txt. Raises UserError where they can't be
    written.
    """
    answers, thresholds, dataset = measured
    names = dataset.classes
    content = {"model": source, **figures(answers, thresholds, names)}
    content["hardest"] = [
        {"file": dataset.sample_id(image["index"]), **image}
        for image in hardest(answers, thresholds, names, most_mistakes)
    ]
    content["training"] = diagnosis(log)
    chart = curves_chart(answers.targets, answers.probabilities, content["per_class"])
    command.write_text(folder / "report.json", json.dumps(content, indent=2))
    with command.written(folder / "classes.csv") as path:
        _write_classes(path, content["per_class"])
    with command.written(folder / "curves.png") as path, any_glyphs():
        chart.savefig(path, dpi=120)
    _page(content, chart, dataset).write(folder / "report.html")
    return content


def _write_classes(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in rows:
            name = csv_cell(without_surrogates(row["class"]))
            writer.writerow((name, *(row[key] for key in list(_COLUMNS)[1:])))


def _page(content: dict[str, Any], chart: "Figure", dataset: ImageDataset) -> Page:
    page = begun_page(content, list(summary(content)))
    page.heading("Hardest images")
    if not content["hardest"]:
        page.text("None: every label is right.")
    for image in content["hardest"]:
        page.image(thumbnail(dataset, image["index"]), _caption(image), width=THUMBNAIL)
    page.heading("Classes")
    page.chart(precisions_chart(content["per_class"]))
    page.table(tuple(_COLUMNS.values()), [_cells(row) for row in content["per_class"]])
    page.heading(f"Curves of the {CURVES} hardest classes")
    page.chart(chart)
    if content["confused"]:
        page.heading("One for the other")
        page.text("A label that was missed, and one that was found on the same image without it.")
        rows = [tuple(pair.values()) for pair in content["confused"]]
        page.table(("missed", "found", "images"), rows)
    page.heading("Labels of an image")
    true, found = (content["labels_per_image"][kind] for kind in ("true", "found"))
    most = max(len(true), len(found))
    rows = [(n, *(c[n] if n < len(c) else 0 for c in (true, found))) for n in range(most)]
    page.table(("labels", "images that have so many", "images on which so many are found"), rows)
    page.heading("Calibration")
    page.text("Of the labels that the model gives 80 %, 80 % should be there.")
    page.chart(reliability_chart(content["calibration"]))
    return page


def _cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple("–" if row[key] is None else row[key] for key in _COLUMNS)


def _caption(image: Mapping[str, Any]) -> str:
    parts = [f"{kind} {_shown(image[kind])}" for kind in ("missed", "wrong") if image[kind]]
    return f"{'; '.join(parts)}: {Path(image['file']).name}"


def _shown(labels: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in labels.items())


def summary(content: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What is printed, and heads the page."""
    found = content["labels_per_image"]["true"]
    yield "images", content["images"]
    yield "labels of an image, mean", sum(n * c for n, c in enumerate(found)) / content["images"]
    for key, name in (
        ("map", "mean average precision"),
        ("micro_f1_at_thresholds", "micro F1 at the thresholds"),
        ("macro_f1_at_thresholds", "macro F1 at the thresholds"),
        ("micro_f1", "micro F1 at 0.5"),
        ("macro_f1", "macro F1 at 0.5"),
    ):
        yield name, "–" if content[key] is None else f"{100 * content[key]:.2f} %"
    yield "all labels right", f"{100 * content['exact_match']:.2f} %"
    yield "Hamming loss", content["hamming_loss"]
    yield "binary cross-entropy", content["log_loss"]
    yield "expected calibration error", content["calibration"]["ece"]
    yield "images per second, with reading", round(content["images_per_second"])
    yield "images per second, model alone", round(content["model_images_per_second"])
