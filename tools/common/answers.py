"""A model's answers to the images of an evaluation, and what all reports show of them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from errors import DataError, UserError
from inference import Classifier
from pipeline.bands import shown
from pipeline.dataset import ImageDataset
from pipeline.loader import Loader
from tools import diagnose
from tools.common import command, trained
from tools.common.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # of the calibration error, as in its paper
THUMBNAIL = 112  # pixels


@dataclass(frozen=True)
class Answers:
    """A model's answers to N images of C classes."""

    probabilities: np.ndarray
    """(N, C) float32; of a multi-label model float64."""
    targets: np.ndarray
    """(N,) int64; of a multi-label set (N, C) of 0 and 1."""
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
        """(N,), their probabilities."""
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
            trained.probabilities(classifier, images, flip=flip)
        begun = time.perf_counter()
        # The answers come to the host, so the device has done its work.
        parts.append(trained.probabilities(classifier, images, flip=flip).cpu())
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


def calibration(confidences: np.ndarray, right: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error of (N,) answers and what it is made of.

    ECE = Σ nᵦ/N · |accuracyᵦ - confidenceᵦ| over equal bins of the confidence ("On Calibration of
    Modern Neural Networks", arXiv:1706.04599). Bins are (low, high]; means of empty ones are None.
    """
    confidences = confidences.astype(np.float64)
    place = bin_of(confidences, bins)
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


def bin_of(confidences: np.ndarray, bins: int = BINS) -> np.ndarray:
    """In which of the equal bins (low, high] each confidence is, int64 of the same shape."""
    return np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)


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


def thumbnail(dataset: ImageDataset, index: int) -> Image.Image:
    form, background = dataset.transform.form, dataset.transform.background
    image = shown(dataset.source.read(index)[0], form, background)
    scale = THUMBNAIL / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    # Small images are shown with the pixels they have.
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def diagnosis(log: Path | None) -> list[dict[str, str]] | None:
    """The problems that a log shows; None where there is none, or too little of it."""
    if log is None or not log.is_file():
        return None
    try:
        return [vars(problem) for problem in diagnose.diagnose(diagnose.records_of(log))]
    except UserError:
        return None


def begun_page(content: Mapping[str, Any], summary: Sequence[tuple[str, object]]) -> Page:
    """How every report begins: ``summary``, images left out, and what the log shows."""
    page = Page(f"Report of {content['model']}")
    page.table(("figure", "value"), summary)
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
    return page
