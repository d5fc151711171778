"""How many labels images have, and which come together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outputs.names import chart_label
from tools.common.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 200  # up to so many the whole table is kept, of more only the pairs
PAIRS = 50  # the most frequent ones
NAMED_CLASSES = 40  # up to so many the heatmap names each


def label_report(
    images_labels: Sequence[Sequence[int]], class_names: Sequence[str]
) -> dict[str, Any]:
    """Plain values on the labels of a part.

    Args:
        images_labels: the numbers of the labels of each image.
        class_names: of the C labels.

    Returns:
        "per_image": how many images have 0, 1, 2 … labels; "co_occurrence": (C, C) images that have
        both labels, those of a label on the diagonal, None for many classes; "pairs": the most
        frequent ones with "images", the "share" of the rarer label's images, and "lift", how many
        times more they are than if labels came independently of each other.
    """
    counts = np.zeros((len(class_names), len(class_names)), np.int64)
    for labels in images_labels:
        counts[np.ix_(labels, labels)] += 1
    single, images = counts.diagonal(), max(1, len(images_labels))
    rows, columns = np.triu_indices(len(class_names), 1)
    found = counts[rows, columns]
    order = (-found).argsort(kind="stable")[:PAIRS]
    pairs = [
        {
            "labels": [class_names[rows[i]], class_names[columns[i]]],
            "images": int(found[i]),
            "share": float(found[i] / min(single[rows[i]], single[columns[i]])),
            "lift": float(found[i] * images / (single[rows[i]] * single[columns[i]])),
        }
        for i in order
        if found[i]
    ]
    return {
        "per_image": np.bincount(list(map(len, images_labels))).tolist(),
        "co_occurrence": counts.tolist() if len(class_names) <= MOST_CLASSES else None,
        "pairs": pairs,
    }


def add_to_page(page: Page, parts: dict[str, dict[str, Any]], class_names: Sequence[str]) -> None:
    """The section of a page on the labels of each part, and on the pairs of the training part."""
    page.heading("Labels of an image")
    most = max(len(part["per_image"]) for part in parts.values())
    rows = [
        (n, *(c[n] if n < len(c) else 0 for c in (part["per_image"] for part in parts.values())))
        for n in range(most)
    ]
    page.table(("labels", *parts), rows)
    train = parts["train"]
    page.heading("Labels that come together")
    if train["co_occurrence"]:
        page.chart(heatmap(np.array(train["co_occurrence"]), class_names))
    rows = [(*p["labels"], p["images"], p["share"], p["lift"]) for p in train["pairs"]]
    header = ("label", "and", "images", "share of the rarer", "times more than by chance")
    page.table(header, rows)


def heatmap(counts: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """(C, C) images with both labels, as shares of the images with the label of the row."""
    from matplotlib.figure import Figure

    count = len(class_names)
    side = min(11.0, max(4.0, 0.42 * count + 1))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.diagonal()[:, None], 1)
    np.fill_diagonal(shares, np.nan)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the row's images")
    axes.set(xlabel="with", ylabel="images of")
    if count <= NAMED_CLASSES:
        names = [chart_label(name) for name in class_names]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    return figure
