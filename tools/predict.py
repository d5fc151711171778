"""Classify images: the likeliest classes and how sure the model is.

Exit code 4 says that some images could not be read; standard error names them.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from errors import printable
from inference import Classifier
from outputs.console import say
from outputs.names import csv_cell, csv_path
from pipeline.decoding import BadImageError
from tools.common import command, trained


class Prediction(NamedTuple):
    """The answer to one image, the likeliest class first."""

    file: str
    classes: list[str]
    confidences: list[float]


def predict(
    classifier: Classifier,
    paths: Sequence[str],
    *,
    device: torch.device,
    topk: int = 5,
    batch_size: int = 64,
    flip: bool = False,
    unreadable: Callable[[str, str], None] = lambda path, reason: None,
) -> Iterator[Prediction]:
    """Answers in the order of ``paths``, batch by batch.

    Args:
        classifier: model, transform and class names.
        paths: image files.
        device: where the model is.
        topk: classes per answer, at most as many as there are.
        batch_size: images at a time.
        flip: take the mean with the answer to the mirrored image.
        unreadable: called with the path and the reason for an image that is left out.
    """
    topk = min(topk, len(classifier.class_names))

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
            likeliest = trained.probabilities(classifier.model, images, flip=flip).topk(topk)
            answers = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
            for (path, _), (confidences, indices) in zip(good, answers, strict=True):
                yield Prediction(path, [classifier.class_names[i] for i in indices], confidences)


# --- output ---------------------------------------------------------------------------------------


def write_table(predictions: Iterable[Prediction], out: TextIO) -> None:
    """One line per image: path, then each class with its confidence."""
    for file, classes, confidences in predictions:
        answers = zip(classes, confidences, strict=True)
        shown = "  ".join(f"{printable(name)} {100 * share:.1f} %" for name, share in answers)
        print(f"{printable(file)}  {shown}", file=out, flush=True)


def write_json(predictions: Iterable[Prediction], out: TextIO) -> None:
    """One array, an object per image, written as the answers come."""
    separator = "["
    for file, classes, confidences in predictions:
        answers = [
            {"class": name, "confidence": share}
            for name, share in zip(classes, confidences, strict=True)
        ]
        out.write(f"{separator}\n{json.dumps({'file': file, 'predictions': answers})}")
        separator = ","
    out.write("[]\n" if separator == "[" else "\n]\n")


def write_csv(predictions: Iterable[Prediction], out: TextIO) -> None:
    """Columns file, rank (from 1), class, confidence; a row per class.

    What a spreadsheet would take for a formula has an apostrophe in front, a path ``./``.
    """
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("file", "rank", "class", "confidence"))
    for file, classes, confidences in predictions:
        for rank, (name, share) in enumerate(zip(classes, confidences, strict=True), start=1):
            writer.writerow((csv_path(file), rank, csv_cell(name), f"{share:.6f}"))


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
    parser.add_argument("--topk", type=command.positive, default=5, help="classes per answer")
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
