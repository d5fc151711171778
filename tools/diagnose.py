"""Find what is wrong in a run's log.txt: exploding, flat, over- or underfitting, with the evidence.

The rules are rules of thumb; each problem comes with the figures that show it.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from loggers import LOG_FILE, read_log
from tools.common import command

Record = Mapping[str, Any]

LEAST_EPOCHS = 3  # fewer show no trend
RISE = 1.5  # a training loss this many times its best before is exploding
FLAT = 0.02  # share of its first value that a training loss must lose to be learning
OVERFIT = 0.05  # share by which the test loss may rise over its best
UNDERFIT = 0.7  # share of the first training loss that a run which learnt something is below
STILL_FALLING = 0.05  # share of the test loss that the last quarter of the epochs took off


@dataclass(frozen=True)
class TrainingProblem:
    """Something wrong that a run's curves show."""

    kind: str
    """exploding, flat, overfitting, underfitting or unfinished."""
    evidence: str
    """The figures."""
    advice: str
    """What helps."""


def diagnose(records: Sequence[Record]) -> list[TrainingProblem]:
    """The problems that the epochs of a ``log.txt`` show, the gravest first.

    Raises UserError for fewer epochs than show a trend.
    """
    if len(records) < LEAST_EPOCHS:
        raise UserError(f"{len(records)} epochs show no trend yet: {LEAST_EPOCHS} are needed")
    grave = _exploding(records) or _flat(records)
    if grave:
        return [grave]
    # --val-interval leaves epochs without a test loss.
    validated = [record for record in records if "test_loss" in record]
    if len(validated) < 2:
        return []
    rules = (_overfitting, _underfitting, _unfinished)
    return [problem for rule in rules if (problem := rule(validated))]


def _exploding(records: Sequence[Record]) -> TrainingProblem | None:
    advice = "lower --lr, lengthen --warmup-epochs, or add --clip-grad 1"
    losses = [_value(r, "train_loss") for r in records]
    for record, loss in zip(records, losses, strict=True):
        test = _value(record, "test_loss") if "test_loss" in record else 0.0
        if not math.isfinite(loss + test):
            return TrainingProblem("exploding", f"a loss of {_epoch(record)} is not finite", advice)
    best = losses[0]
    for record, loss in zip(records, losses, strict=True):
        if loss > RISE * best:
            evidence = (
                f"the training loss rose to {loss:.4g} in {_epoch(record)}, it was {best:.4g}"
            )
            return TrainingProblem("exploding", evidence, advice)
        best = min(best, loss)
    skipped = records[-1].get("skipped_updates", 0)
    if skipped:
        evidence = f"{skipped} updates were left out: their loss or gradient was not finite"
        return TrainingProblem("exploding", evidence, advice)
    return None


def _flat(records: Sequence[Record]) -> TrainingProblem | None:
    losses = [_value(r, "train_loss") for r in records]
    if losses[0] - min(losses) >= FLAT * abs(losses[0]):
        return None
    evidence = (
        f"the training loss is {losses[0]:.4g} after {_epoch(records[0])} and at best "
        f"{min(losses):.4g} in {len(records)} epochs"
    )
    advice = (
        "try --overfit-batches 2: if that loss doesn't fall either, the data or the labels are "
        "wrong; if it does, raise --lr, or look for what is frozen"
    )
    return TrainingProblem("flat", evidence, advice)


def _overfitting(records: Sequence[Record]) -> TrainingProblem | None:
    test = [_value(r, "test_loss") for r in records]
    train = [_value(r, "train_loss") for r in records]
    best = min(range(len(test)), key=test.__getitem__)
    rise = test[-1] / test[best] - 1 if test[best] > 0 else 0.0
    if rise < OVERFIT or train[-1] >= train[best]:
        return None
    evidence = (
        f"since {_epoch(records[best])} the test loss rose from {test[best]:.4g} to "
        f"{test[-1]:.4g} ({rise:+.0%}), while the training loss fell from {train[best]:.4g} to "
        f"{train[-1]:.4g}"
    )
    advice = (
        "more images, stronger augmentation (--aa, --mixup, --reprob), --drop-path, --smoothing, "
        "or --early-stop; best.pth holds the best epoch"
    )
    return TrainingProblem("overfitting", evidence, advice)


def _underfitting(records: Sequence[Record]) -> TrainingProblem | None:
    first, last = (_value(r, "train_loss") for r in (records[0], records[-1]))
    test_first, test_last = (_value(r, "test_loss") for r in (records[0], records[-1]))
    # Mixing and smoothing keep the training loss high; the test loss isn't mixed.
    if last < UNDERFIT * first or test_last < UNDERFIT * test_first:
        return None
    evidence = (
        f"in {records[-1]['epoch']} epochs the training loss went from {first:.4g} to {last:.4g}, "
        f"the test loss from {test_first:.4g} to {test_last:.4g}"
    )
    advice = "a higher --lr, more --epochs, a larger model, --pretrained, or weaker augmentation"
    return TrainingProblem("underfitting", evidence, advice)


def _unfinished(records: Sequence[Record]) -> TrainingProblem | None:
    quarter = max(1, len(records) // 4)
    earlier, latest = records[-1 - quarter], records[-1]
    before, last = _value(earlier, "test_loss"), _value(latest, "test_loss")
    fell = 1 - last / before if before > 0 else 0.0
    if fell < STILL_FALLING:
        return None
    evidence = (
        f"the test loss still fell from {before:.4g} to {last:.4g} ({-fell:+.0%}) "
        f"in the last {latest['epoch'] - earlier['epoch']} epochs"
    )
    return TrainingProblem("unfinished", evidence, "more --epochs")


def _value(record: Record, key: str) -> float:
    # JSON has no NaN: log.txt has null in its place.
    value = record.get(key)
    return math.nan if value is None else float(value)


def _epoch(record: Record) -> str:
    return f"epoch {record['epoch']}"


# --- command line ---------------------------------------------------------------------------------


def records_of(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run's folder or of a ``log.txt``. Raises UserError where there are none."""
    path = run / LOG_FILE if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a run's folder or its {LOG_FILE}")
    records = [r for r in read_log(path) if isinstance(r, dict) and "train_loss" in r]
    if not records:
        raise UserError(f"{path} holds no epochs")
    return records


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("diagnose", __doc__)
    parser.add_argument("run", type=Path, help=f"a run's folder, or its {LOG_FILE}")
    parser.add_argument("--json", action="store_true", help="print an array of problems")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    problems = diagnose(records_of(arguments.run))
    if arguments.json:
        print(json.dumps([asdict(problem) for problem in problems], indent=2))
        return
    for problem in problems:
        print(f"{problem.kind}: {problem.evidence}\n  what helps: {problem.advice}")
    if not problems:
        print("nothing found: the losses fell and stayed down")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv, reader_ends=True)


if __name__ == "__main__":
    sys.exit(main())
