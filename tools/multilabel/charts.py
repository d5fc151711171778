"""Charts of a multi-label model's classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outputs.names import chart_label
from tools.multilabel.figures import curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = 10  # classes of which the curves are drawn, those of the lowest average precision
NAMED_CLASSES = 60  # up to so many a chart names each


def curves_chart(
    targets: np.ndarray, probabilities: np.ndarray, rows: Sequence[dict[str, Any]]
) -> "Figure":
    """Precision against recall, and F1 against the threshold, of the hardest classes.

    Args:
        targets: (N, C) of 0 and 1.
        probabilities: (N, C).
        rows: the figures of each class.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    there = [i for i, row in enumerate(rows) if row["images"]]
    hardest = sorted(there, key=lambda i: rows[i]["average_precision"])[:CURVES]
    for number, index in enumerate(hardest):
        row, color = rows[index], f"C{number}"
        found = curve(targets[:, index], probabilities[:, index])
        # The curve ends where nothing is found any more: precision 1 by custom.
        recall, precision = np.append(found.recall, 0), np.append(found.precision, 1)
        name = f"{chart_label(row['class'])}, AP {row['average_precision']:.2f}"
        left.plot(recall, precision, color=color, label=name)
        right.plot(found.thresholds, found.f1, color=color)
        right.plot(row["threshold"], row["f1"], "o", color=color)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="threshold (dots: the model's)", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02))
    if hardest:
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def precisions_chart(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Average precision and F1 of each class, the highest precision first."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row["images"]), key=lambda row: -row["average_precision"])
    few = len(rows) <= NAMED_CLASSES
    size = (7, max(2.0, 0.26 * len(rows) + 1)) if few else (8, 3.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    precisions, scores = ([row[k] for row in rows] for k in ("average_precision", "f1"))
    places = range(len(rows))
    if few:
        axes.barh(places, precisions, color="tab:blue", label="average precision")
        axes.plot(scores, places, "o", color="tab:orange", label="F1 at the threshold")
        axes.set_yticks(places, [chart_label(row["class"]) for row in rows])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.02))
    else:
        axes.plot(precisions, color="tab:blue", label="average precision")
        axes.plot(scores, ".", color="tab:orange", label="F1 at the threshold")
        axes.set(xlabel="classes", ylim=(0, 1.02))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure
