"""Evaluate a trained model on labelled images: a self-contained HTML page, JSON and CSV.

Accuracy, figures of each class, confusion, calibration, the most confident mistakes, speed, and
what the run's log.txt shows. The images are those the run was validated on, unless others are
named.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from sklearn import metrics

from errors import DataError, UserError, without_surrogates
from inference import Classifier
from loggers import LOG_FILE
from outputs.console import say
from outputs.names import any_glyphs, chart_label, csv_cell
from pipeline.dataset import ImageDataset
from pipeline.decoding import decode
from pipeline.loader import Loader
from tools import diagnose
from tools.common import command, trained
from tools.common.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # of the calibration error, as in its paper
NAMED_CLASSES = 30  # up to so many the axes of the confusion matrix name each
THUMBNAIL = 112  # pixels


@dataclass(frozen=True)
class Answers:
    """A model's answers to N images of C classes."""

    probabilities: np.ndarray
    """(N, C) float32."""
    targets: np.ndarray
    """(N,) int64."""
    indices: np.ndarray
    """(N,) int64, indices in the data set."""
    bad: list[str]
    """"path: reason" of each image that could not be read."""
    images_per_second: float
    """From files to answers."""
    model_images_per_second: float
    """Of the model alone."""

    @property
    def predictions(self) -> np.ndarray:
        """(N,) int64, the likeliest classes."""
        return self.probabilities.argmax(1)

    @property
    def confidences(self) -> np.ndarray:
        """(N,) float32, their probabilities."""
        return self.probabilities.max(1)


def collect_answers(
    classifier: Classifier, loader: Loader, device: torch.device, *, flip: bool = False
) -> Answers:
    """Run ``classifier`` on all images of ``loader``. Raises DataError if none is readable."""
    parts, targets, indices, bad = [], [], [], []
    in_model = 0.0
    start = time.perf_counter()
    for batch in command.progress(loader, "batches", total=len(loader)):
        bad += batch.bad
        if not len(batch.targets):
            continue
        images = batch.images.to(device)
        if not parts:
            # What is set up once isn't timed.
            trained.probabilities(classifier.model, images, flip=flip)
        begun = time.perf_counter()
        # The answers come to the host, so the device has done its work.
        parts.append(trained.probabilities(classifier.model, images, flip=flip).cpu())
        in_model += time.perf_counter() - begun
        targets.append(batch.targets)
        indices.append(batch.indices)
    if not parts:
        raise DataError("no image could be read" + (f": {bad[0]}" if bad else ""))
    seconds, count = time.perf_counter() - start, sum(map(len, parts))
    return Answers(
        torch.cat(parts).numpy(),
        torch.cat(targets).numpy(),
        torch.cat(indices).numpy(),
        bad,
        count / seconds,
        count / in_model,
    )


# --- figures --------------------------------------------------------------------------------------


def calibration(answers: Answers, bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error and what it is made of.

    ECE = Σ nᵦ/N · |accuracyᵦ - confidenceᵦ| over equal bins of the confidence ("On Calibration of
    Modern Neural Networks", arXiv:1706.04599). Bins are (low, high]; means of empty ones are None.
    """
    confidences = answers.confidences.astype(np.float64)
    right = answers.predictions == answers.targets
    place = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=w, minlength=bins) for w in (confidences, right)]
    gaps = np.abs(sums[1] - sums[0]).sum() / len(right)
    confidence, accuracy = (
        [float(s / n) if n else None for s, n in zip(part, counts, strict=True)] for part in sums
    )
    return {
        "ece": float(gaps),
        "bins": {"count": counts.tolist(), "confidence": confidence, "accuracy": accuracy},
    }


def figures(answers: Answers, class_names: Sequence[str]) -> dict[str, Any]:
    """The report's figures as plain values; shares are in 0-1."""
    labels = np.arange(len(class_names))
    predictions, targets = answers.predictions, answers.targets
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        targets, predictions, labels=labels, zero_division=0
    )
    predicted = np.bincount(predictions, minlength=len(labels))
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
    if len(labels) > 5:
        top5 = float(
            metrics.top_k_accuracy_score(targets, answers.probabilities, k=5, labels=labels)
        )
    present = support > 0
    of_truth = answers.probabilities[np.arange(len(targets)), targets].astype(np.float64)
    return {
        "images": len(targets),
        "unreadable": answers.bad,
        "top1": float(metrics.accuracy_score(targets, predictions)),
        "top5": top5,
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "log_loss": float(-np.log(of_truth.clip(min=np.finfo(np.float32).tiny)).mean()),
        "calibration": calibration(answers),
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
        labels = [chart_label(name) for name in class_names]
        axes.set_xticks(range(count), labels, rotation=90)
        axes.set_yticks(range(count), labels)
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=color)
    return figure


def reliability_chart(measured: dict[str, Any]) -> "Figure":
    """Accuracy against confidence, and how many images are at each."""
    from matplotlib.figure import Figure

    bins = measured["bins"]
    count = len(bins["count"])
    middle = (np.arange(count) + 0.5) / count
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    heights = [value or 0.0 for value in bins["accuracy"]]
    above.bar(middle, heights, width=0.9 / count, color="tab:blue", label="accuracy")
    above.plot((0, 1), (0, 1), "--", color="tab:gray", label="calibrated")
    filled = [i for i, n in enumerate(bins["count"]) if n]
    above.plot(
        [bins["confidence"][i] for i in filled],
        [bins["accuracy"][i] for i in filled],
        "o",
        color="tab:orange",
        markersize=4,
        label="mean of a bin",
    )
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    above.set_title(f"expected calibration error {measured['ece']:.3f}")
    above.legend(loc="upper left")
    below.bar(middle, bins["count"], width=0.9 / count, color="tab:gray")
    below.set(xlabel="confidence", ylabel="images")
    return figure


def _thumbnail(dataset: ImageDataset, index: int) -> Image.Image:
    image = decode(dataset.source.read(index)[0], dataset.transform.background)
    scale = THUMBNAIL / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    # Small images are shown with the pixels they have.
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


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
    content["training"] = _diagnosis(log)
    matrix = metrics.confusion_matrix(
        answers.targets, answers.predictions, labels=np.arange(len(names))
    )
    chart = confusion_chart(matrix, names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        _write_matrix(folder / "confusion.csv", matrix, names)
        with any_glyphs():
            chart.savefig(folder / "confusion.png", dpi=120)
    except OSError as error:
        raise command.not_written(folder, error) from None
    _page(content, chart, dataset).write(folder / "report.html")
    return content


def _write_matrix(path: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [csv_cell(without_surrogates(name)) for name in names]
        writer.writerow(("true \\ predicted", *names))
        for name, row in zip(names, matrix.tolist(), strict=True):
            writer.writerow((name, *row))


def _diagnosis(log: Path | None) -> list[dict[str, str]] | None:
    """The problems that a log shows; None where there is none, or too little of it."""
    if log is None or not log.is_file():
        return None
    try:
        return [vars(problem) for problem in diagnose.diagnose(diagnose.records_of(log))]
    except UserError:
        return None


def _page(content: dict[str, Any], chart: "Figure", dataset: ImageDataset) -> Page:
    page = Page(f"Report of {content['model']}")
    page.table(("figure", "value"), _summary(content))
    if content["unreadable"]:
        count = len(content["unreadable"])
        page.text(f"{count} images could not be read and are left out.", warning=True)
    if content["training"] is not None:
        page.heading("Training")
        for problem in content["training"]:
            page.text(f"{problem['kind'].capitalize()}: {problem['evidence']}.", warning=True)
            page.text(f"What helps: {problem['advice']}.")
        if not content["training"]:
            page.text("The losses fell and stayed down.")
    page.heading("Most confident mistakes")
    if not content["mistakes"]:
        page.text("None.")
    for mistake in content["mistakes"]:
        caption = (
            f"{mistake['true']}, taken for {mistake['predicted']} "
            f"({100 * mistake['confidence']:.0f} %): {Path(mistake['file']).name}"
        )
        page.image(_thumbnail(dataset, mistake["index"]), caption, width=THUMBNAIL)
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
    content = write(
        folder,
        arguments.model,
        answers,
        loader.dataset,
        most_mistakes=arguments.mistakes,
        log=arguments.log or beside / LOG_FILE,
    )
    for name, value in _summary(content):
        print(f"{name:<34}{value if not isinstance(value, float) else f'{value:.3f}'}")
    for problem in content["training"] or ():
        say(f"training: {problem['kind']}: {problem['evidence']}")
    say(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
