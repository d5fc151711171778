"""Classify images: the likeliest classes and how sure the model is; of a multi-label model, all
labels that reach their thresholds.

Exit code 4 says that some images could not be read; standard error names them.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from errors import printable
from inference import Classifier
from outputs.console import say
from outputs.names import csv_cell, csv_path
from pipeline.decoding import BadImageError
from tools.common import command, labels, trained

TOPK = 5  # classes per answer, unless --topk says otherwise


class Prediction(NamedTuple):
    """The answer to one image, the likeliest class first."""

    file: str
    classes: list[str]
    confidences: list[float]
    thresholds: list[float] | None = None
    """Of a multi-label model, that of each class: from it on the label is there."""

    def present(self) -> list[bool]:
        """Whether each label is there."""
        limits = self.thresholds or [0.0] * len(self.classes)
        return [share >= limit for share, limit in zip(self.confidences, limits, strict=True)]


def predict(
    classifier: Classifier,
    paths: Sequence[str],
    *,
    device: torch.device,
    topk: int | None = None,
    thresholds: np.ndarray | None = None,
    batch_size: int = 64,
    flip: bool = False,
    unreadable: Callable[[str, str], None] = lambda path, reason: None,
) -> Iterator[Prediction]:
    """Answers in the order of ``paths``, batch by batch.

    Args:
        classifier: model, transform and class names.
        paths: image files.
        device: where the model is.
        topk: classes per answer, at most as many as there are. None: 5; of a multi-label model
            the labels that are there, whatever their number.
        thresholds: (C,) of a multi-label model, from which a label is there. None: its own.
        batch_size: images at a time.
        flip: take the mean with the answer to the mirrored image.
        unreadable: called with the path and the reason for an image that is left out.
    """
    limits = labels.thresholds_of(classifier) if thresholds is None else thresholds

    def read(path: str) -> Tensor | str:
        try:
            return classifier.transform(path)
        except BadImageError as error:
            return str(error)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for chunk in trained.chunks(paths, batch_size):
            good: list[tuple[str, Tensor]] = []
            for path, result in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(result, str):
                    unreadable(path, result)
                else:
                    good.append((path, result))
            if not good:
                continue
            images = torch.stack([image for _, image in good]).to(device)
            answers = trained.probabilities(classifier, images, flip=flip).cpu().numpy()
            for (path, _), shares in zip(good, answers, strict=True):
                yield _prediction(classifier, path, shares, topk, limits)


def _prediction(
    classifier: Classifier, path: str, shares: np.ndarray, topk: int | None, limits: np.ndarray
) -> Prediction:
    several = labels.is_multilabel(classifier)
    if several and topk is None:
        shown = labels.found(shares, limits)
    else:
        shown = labels.likeliest_first(shares, topk or TOPK)
    return Prediction(
        path,
        [classifier.class_names[i] for i in shown],
        shares[shown].tolist(),
        limits[shown].tolist() if several else None,
    )


# --- output ---------------------------------------------------------------------------------------


def write_table(predictions: Iterable[Prediction], out: TextIO) -> None:
    """One line per image: path, then each class with its confidence; labels that are not there in
    brackets."""
    for prediction in predictions:
        each = zip(prediction.classes, prediction.confidences, prediction.present(), strict=True)
        answers = ((f"{printable(name)} {100 * share:.1f} %", there) for name, share, there in each)
        shown = [text if there else f"({text})" for text, there in answers]
        if not any(prediction.present()):
            shown.insert(0, "no label")
        print(f"{printable(prediction.file)}  {'  '.join(shown)}", file=out, flush=True)


def write_json(predictions: Iterable[Prediction], out: TextIO) -> None:
    """One array, an object per image, written as the answers come."""
    separator = "["
    for prediction in predictions:
        out.write(f"{separator}\n{json.dumps(_as_object(prediction))}")
        separator = ","
    out.write("[]\n" if separator == "[" else "\n]\n")


def _as_object(prediction: Prediction) -> dict[str, Any]:
    file, classes, confidences, thresholds = prediction
    answers: list[dict[str, Any]] = [
        {"class": name, "confidence": share}
        for name, share in zip(classes, confidences, strict=True)
    ]
    if thresholds is None:
        return {"file": file, "predictions": answers}
    for answer, threshold in zip(answers, thresholds, strict=True):
        answer["threshold"] = threshold
    there = [name for name, is_there in zip(classes, prediction.present(), strict=True) if is_there]
    return {"file": file, "labels": there, "predictions": answers}


def write_csv(predictions: Iterable[Prediction], out: TextIO) -> None:
    """Columns file, rank (from 1), class, confidence; a row per class. Of a multi-label model also
    threshold and present (1 or 0); an image of which no label is shown has one row of rank 0.

    What a spreadsheet would take for a formula has an apostrophe in front, a path ``./``.
    """
    writer = csv.writer(out, lineterminator="\n")
    header: tuple[str, ...] = ("file", "rank", "class", "confidence")
    begun = False
    for file, classes, confidences, thresholds in predictions:
        if not begun:
            header = header if thresholds is None else (*header, "threshold", "present")
            writer.writerow(header)
            begun = True
        for rank, (name, share) in enumerate(zip(classes, confidences, strict=True), start=1):
            row = (csv_path(file), rank, csv_cell(name), f"{share:.6f}")
            if thresholds is not None:
                there = int(share >= thresholds[rank - 1])
                row = (*row, f"{thresholds[rank - 1]:.6f}", there)
            writer.writerow(row)
        if not classes:
            writer.writerow((csv_path(file), 0, "", "", "", ""))
    if not begun:
        writer.writerow(header)


WRITERS = {"table": write_table, "json": write_json, "csv": write_csv}


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("predict", __doc__)
    trained.add_model_arguments(parser)
    parser.add_argument(
        "inputs",
        nargs="+",
        help="images, folders, quoted patterns, CSV files, or - for one path per line",
    )
    parser.add_argument(
        "--topk",
        type=command.positive,
        help=f"classes per answer (default: {TOPK}; multi-label: all labels that are there)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="multi-label: the probability from which a label is there (default: of each class "
        "the one that validation chose)",
    )
    parser.add_argument("--format", choices=WRITERS, default="table")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    trained.add_batch_size(parser)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    model = trained.open_model(arguments)
    paths = trained.find_images(arguments.inputs)
    bad = []

    def unreadable(path: str, reason: str) -> None:
        bad.append(path)
        say(f"{path}: {reason}", error=True)

    predictions = predict(
        model.classifier,
        paths,
        device=model.device,
        topk=arguments.topk,
        thresholds=labels.with_threshold(model.classifier, arguments.threshold),
        batch_size=arguments.batch_size,
        flip=arguments.flip,
        unreadable=unreadable,
    )
    shown = command.progress(predictions, "images", total=len(paths))
    WRITERS[arguments.format](shown, sys.stdout)
    if bad:
        print(f"{len(bad)} of {len(paths)} images could not be read", file=sys.stderr)
    return trained.SOME_UNREADABLE if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv, reader_ends=True)


if __name__ == "__main__":
    sys.exit(main())
