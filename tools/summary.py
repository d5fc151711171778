"""Several runs beside each other, with mean and std of their scores: folds, or seeds.

    python -m tools.summary output/fold-*

Of each run the epoch counts that is best by --metric, the one of its own options if it isn't
named. The std is that of a sample (n - 1).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpointing.folder import CONFIG_FILE
from config import by_name, is_option, read_yaml, value_text
from config.metrics import metric_key
from errors import UserError, did_you_mean, first_names
from outputs.console import say
from tools.common import command
from tools.diagnose import records_of

# What runs may differ in and still be the same experiment.
_EXPECTED = {"data_path", "output_dir", "seed", "resume", "num_workers", "device"}


class Result(NamedTuple):
    """A run's best epoch."""

    run: Path
    record: Mapping[str, Any]
    """Its line of log.txt."""
    options: Mapping[str, Any]
    """The run's config.yaml."""


def best_epoch(records: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The first record with the best value of ``metric``; None where no epoch has any."""
    scored = [r for r in records if r.get(metric) is not None]
    if not scored:
        return None
    return (min if metric.endswith("loss") else max)(scored, key=lambda r: r[metric])


def collect(runs: Sequence[Path], metric: str) -> list[Result]:
    """The best epoch of each run; ``metric`` may be empty. Raises UserError."""
    found = []
    for run in runs:
        records, options = records_of(run), _options(run)
        key = metric or options.get("best_metric") or by_name("best_metric").default
        record = best_epoch(records, key)
        if record is None:
            scores = [name for name in records[-1] if _is_score(name, records[-1])]
            hint = did_you_mean(key, scores, otherwise=f"there are {', '.join(scores)}")
            raise UserError(f"{run}: no epoch has a {key}; {hint}")
        found.append(Result(run, record, options))
    return found


def summarise(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Mean and std of each score that all runs have, by its log key."""
    records = [result.record for result in results]
    keys = [key for key in records[0] if all(_is_score(key, record) for record in records)]
    columns = {key: [float(record[key]) for record in records] for key in keys}
    return {
        key: {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        }
        for key, values in columns.items()
    }


def differences(results: Sequence[Result]) -> dict[str, list[str]]:
    """The options that are not the same in all runs, and their values as texts."""
    known = [result.options for result in results if result.options]
    names = sorted({name for options in known for name in options} - _EXPECTED)
    found = {}
    for name in filter(is_option, names):
        texts = [value_text(options.get(name, by_name(name).default)) for options in known]
        if len(set(texts)) > 1:
            found[name] = texts
    return found


def _is_score(key: str, record: Mapping[str, Any]) -> bool:
    kind = key.startswith(("train_", "test_", "ema_")) and key != "train_lr"
    return kind and type(record.get(key)) in (float, int)


def _options(run: Path) -> dict[str, Any]:
    """The run's options; none where it has no config.yaml."""
    path = (run if run.is_dir() else run.parent) / CONFIG_FILE
    if not path.is_file():
        return {}
    return {name: value for _, layer in read_yaml(path) for name, value in layer.items()}


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("summary", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their log.txt")
    parser.add_argument(
        "--metric", default="", help="a key of log.txt, test_ may be left out (default: the run's)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    metric = metric_key(arguments.metric) if arguments.metric else ""
    results = collect(arguments.runs, metric)
    table, differing = summarise(results), differences(results)
    if arguments.json:
        runs = [{"run": str(r.run), **r.record} for r in results]
        print(json.dumps({"runs": runs, "summary": table, "differences": differing}, indent=2))
        return
    width = max(len(str(result.run)) for result in results)
    shown = [key for key in table if key.startswith("test_")] or list(table)
    shown += [metric] if metric in table and metric not in shown else []
    for result in results:
        scores = "  ".join(f"{key} {result.record[key]:.4g}" for key in shown)
        say(f"{result.run!s:<{width}}  epoch {result.record['epoch']}  {scores}")
    for key, value in table.items():
        say(f"{key:<20} {value['mean']:.4g} ± {value['std']:.2g}")
    for name, texts in differing.items():
        say(f"warning: the runs differ in {by_name(name).flag}: {first_names(texts)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv, reader_ends=True)


if __name__ == "__main__":
    sys.exit(main())
