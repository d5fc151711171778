"""Evaluate a trained model on labelled images: a self-contained HTML page, JSON and CSV.

Accuracy, figures of each class, confusion, calibration, the most confident mistakes, speed, and
what the run's log.txt shows. Of a multi-label model average precision, F1 and thresholds of each
class, and the hardest images. The images are those the run was validated on, unless others are
named.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn import metrics

from errors import without_surrogates
from loggers import LOG_FILE
from outputs.console import say
from outputs.names import any_glyphs, chart_label, csv_cell
from pipeline.dataset import ImageDataset
from tools.common import command, labels, trained
from tools.common.answers import (
    THUMBNAIL,
    Answers,
    begun_page,
    calibration,
    collect_answers,
    diagnosis,
    reliability_chart,
    thumbnail,
)
from tools.common.page import Page
from tools.multilabel import report as multilabel_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_CLASSES = 30  # up to so many the axes of the confusion matrix name each


# --- figures --------------------------------------------------------------------------------------


def figures(answers: Answers, class_names: Sequence[str]) -> dict[str, Any]:
    """The report's figures as plain values; shares are in 0-1."""
    numbers = np.arange(len(class_names))
    predictions, targets = answers.predictions, answers.targets
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        targets, predictions, labels=numbers, zero_division=0
    )
    predicted = np.bincount(predictions, minlength=len(numbers))
    per_class = [
        {
            "class": name,
            "images": int(n),
            "predicted": int(m),
            "precision": float(p),
            "recall": float(r),
            "f1": float(f),
        }
        for name, n, m, p, r, f in zip(
            class_names, support, predicted, precision, recall, f1, strict=True
        )
    ]
    top5 = None
    if len(numbers) > 5:
        top5 = float(
            metrics.top_k_accuracy_score(targets, answers.probabilities, k=5, labels=numbers)
        )
    present = support > 0
    of_truth = answers.probabilities[np.arange(len(targets)), targets].astype(np.float64)
    return {
        "images": len(targets),
        "unreadable": answers.bad,
        "top1": float(metrics.accuracy_score(targets, predictions)),
        "top5": top5,
        "balanced_accuracy": float(recall[present].mean()),
        # Of classes with images or answers, as scikit-learn and the log have it.
        "macro_f1": float(f1[present | (predicted > 0)].mean()),
        "worst_class_accuracy": float(recall[present].min()),
        "log_loss": float(-np.log(of_truth.clip(min=np.finfo(np.float32).tiny)).mean()),
        "calibration": calibration(answers.confidences, answers.predictions == answers.targets),
        "images_per_second": answers.images_per_second,
        "model_images_per_second": answers.model_images_per_second,
        "per_class": per_class,
    }


def mistakes(answers: Answers, dataset: ImageDataset, limit: int) -> list[dict[str, Any]]:
    """The wrong answers that the model was surest of, surest first."""
    wrong = np.flatnonzero(answers.predictions != answers.targets)
    order = wrong[np.argsort(-answers.confidences[wrong], kind="stable")][:limit]
    return [
        {
            "file": dataset.sample_id(int(answers.indices[i])),
            "index": int(answers.indices[i]),
            "true": dataset.classes[answers.targets[i]],
            "predicted": dataset.classes[answers.predictions[i]],
            "confidence": float(answers.confidences[i]),
        }
        for i in order
    ]


# --- images -------------------------------------------------------------------------------------


def confusion_chart(matrix: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """(C, C) counts, true classes down, as shares of each true class."""
    from matplotlib.figure import Figure

    count = len(class_names)
    side = min(12.0, max(4.5, 0.45 * count))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if count <= NAMED_CLASSES:
        ticks = [chart_label(name) for name in class_names]
        axes.set_xticks(range(count), ticks, rotation=90)
        axes.set_yticks(range(count), ticks)
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=color)
    return figure


# --- the report -----------------------------------------------------------------------------------


def write(
    folder: Path,
    source: str,
    answers: Answers,
    dataset: ImageDataset,
    *,
    most_mistakes: int = 24,
    log: Path | None = None,
) -> dict[str, Any]:
    """Write report.html, report.json, confusion.csv and confusion.png; returns the JSON's content.

    ``log``: the run's log.txt, to be diagnosed. Raises UserError where ``folder`` can't be written.
    """
    names = dataset.classes
    content = {"model": source, **figures(answers, names)}
    content["mistakes"] = mistakes(answers, dataset, most_mistakes)
    content["training"] = diagnosis(log)
    matrix = metrics.confusion_matrix(
        answers.targets, answers.predictions, labels=np.arange(len(names))
    )
    chart = confusion_chart(matrix, names)
    command.write_text(folder / "report.json", json.dumps(content, indent=2))
    with command.written(folder / "confusion.csv") as path:
        _write_matrix(path, matrix, names)
    with command.written(folder / "confusion.png") as path, any_glyphs():
        chart.savefig(path, dpi=120)
    _page(content, chart, dataset).write(folder / "report.html")
    return content


def _write_matrix(path: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [csv_cell(without_surrogates(name)) for name in names]
        writer.writerow(("true \\ predicted", *names))
        for name, row in zip(names, matrix.tolist(), strict=True):
            writer.writerow((name, *row))


def _page(content: dict[str, Any], chart: "Figure", dataset: ImageDataset) -> Page:
    page = begun_page(content, _summary(content))
    page.heading("Most confident mistakes")
    if not content["mistakes"]:
        page.text("None.")
    for mistake in content["mistakes"]:
        caption = (
            f"{mistake['true']}, taken for {mistake['predicted']} "
            f"({100 * mistake['confidence']:.0f} %): {Path(mistake['file']).name}"
        )
        page.image(thumbnail(dataset, mistake["index"]), caption, width=THUMBNAIL)
    page.heading("Confusion")
    page.chart(chart)
    page.heading("Calibration")
    page.text("Of the images that the model is 80 % sure of, 80 % should be right.")
    page.chart(reliability_chart(content["calibration"]))
    page.heading("Classes")
    page.table(
        ("class", "images", "answers", "precision", "recall", "F1"),
        [tuple(row.values()) for row in content["per_class"]],
    )
    return page


def _summary(content: dict[str, Any]) -> list[tuple[str, object]]:
    top5 = content["top5"]
    rows: list[tuple[str, object]] = [
        ("images", content["images"]),
        ("top-1 accuracy", f"{100 * content['top1']:.2f} %"),
        *([("top-5 accuracy", f"{100 * top5:.2f} %")] if top5 is not None else []),
        ("balanced accuracy", f"{100 * content['balanced_accuracy']:.2f} %"),
        ("accuracy of the worst class", f"{100 * content['worst_class_accuracy']:.2f} %"),
        ("F1, mean of the classes", content["macro_f1"]),
        ("cross-entropy", content["log_loss"]),
        ("expected calibration error", content["calibration"]["ece"]),
        ("images per second, with reading", round(content["images_per_second"])),
        ("images per second, model alone", round(content["model_images_per_second"])),
    ]
    return rows


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("report", __doc__)
    trained.add_model_arguments(parser)
    trained.add_data_arguments(parser)
    parser.add_argument("--flip", action="store_true", help="average with the mirrored images")
    parser.add_argument(
        "--mistakes", type=command.positive, default=24, help="how many mistakes are shown"
    )
    parser.add_argument("--log", type=Path, help="the run's log.txt (default: beside the model)")
    parser.add_argument("--output", type=Path, help="folder (default: report beside the model)")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    model = trained.open_model(arguments)
    loader = trained.loader(arguments, model)
    answers = collect_answers(model.classifier, loader, model.device, flip=arguments.flip)
    beside = trained.stem(arguments.model).parent
    folder = arguments.output or beside / "report"
    log = arguments.log or beside / LOG_FILE
    if labels.is_multilabel(model.classifier):
        thresholds = labels.thresholds_of(model.classifier)
        measured = multilabel_report.Measured(answers, thresholds, loader.dataset)
        content = multilabel_report.write(
            folder, arguments.model, measured, most_mistakes=arguments.mistakes, log=log
        )
        summary = multilabel_report.summary(content)
    else:
        content = write(
            folder,
            arguments.model,
            answers,
            loader.dataset,
            most_mistakes=arguments.mistakes,
            log=log,
        )
        summary = _summary(content)
    for name, value in summary:
        print(f"{name:<34}{value if not isinstance(value, float) else f'{value:.3f}'}")
    for problem in content["training"] or ():
        say(f"training: {problem['kind']}: {problem['evidence']}")
    say(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
