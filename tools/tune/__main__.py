"""Search for good options: many runs, each a real training, the hopeless ones stopped early.

    python -m tools.tune --space space.yaml --trials 30 --config configs/quickstart.yaml

The space names options and what to try for each:

    lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    drop_path: {low: 0.0, high: 0.3, step: 0.1}
    opt: {choices: [adamw, lion]}

The study is kept in study.db (SQLite) of the output directory: the same command goes on with it
after a stop, and, started several times or on several machines that share the folder, works on it
together. best.yaml is a recipe for main.py --config.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from errors import UserError
from outputs.console import say
from tools.common import command
from tools.tune.search import search
from tools.tune.space import check_ends, read_space
from tools.tune.study import Study, format_value


def get_parser() -> argparse.ArgumentParser:
    """The command line's options, beside those of main.py."""
    parser = command.run_parser("tune", __doc__)
    add = parser.add_argument
    add("--space", type=Path, required=True, help="YAML file: what to try")
    add("--trials", type=int, default=30, help="of the study in all (default: 30)")
    add("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    add("--devices", nargs="+", default=(), metavar="DEVICE", help="of the jobs: cuda:0 cuda:1 …")
    add("--sampler", choices=("tpe", "grid"), default="tpe", help="(default: tpe)")
    add(
        "--pruner",
        choices=("median", "hyperband", "none"),
        default="median",
        help="what ends hopeless trials early (default: median)",
    )
    add(
        "--prune-after",
        type=int,
        default=5,
        metavar="N",
        help="median: trials before the first is pruned (default: 5)",
    )
    add("--study-seed", type=int, default=0, help="of the sampler (default: 0)")
    return parser


def _pruner(arguments: argparse.Namespace, epochs: int) -> Any:
    optuna = command.require("optuna")
    if arguments.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=arguments.prune_after)
    if arguments.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    return optuna.pruners.NopPruner()


def _carry_out(arguments: argparse.Namespace) -> int:
    command.require("optuna")
    config: Config = arguments.config
    if arguments.trials < 1 or arguments.jobs < 1:
        raise UserError("--trials and --jobs: at least 1")
    axes = read_space(arguments.space)
    check_ends(config, axes)
    name = f"tune-{config.model.model}-{config.data.data_set}".replace("/", "-")
    study = Study(
        config,
        axes,
        Path(config.run.output_dir or Path("output") / name).expanduser(),
        pruner=_pruner(arguments, config.run.epochs),
        seed=arguments.study_seed,
        grid=arguments.sampler == "grid",
    )
    code = search(study, arguments.trials, arguments.jobs, arguments.devices)
    if not study.completed():
        print("no trial has come to its end")
        return code or 1
    _print_results(study)
    return code


def _print_results(study: Study) -> None:
    best, folder = study.completed()[0], study.folder
    print(f"best: trial {best.number}, {study.metric} {best.value:.4g}")
    for name, value in study.values_of(best).items():
        print(f"  {name}: {format_value(value)}")
    plots = [folder / f"{name}.png" for name in ("history", "importance")]
    say(f"plots: {', '.join(str(path) for path in plots if path.exists())}")
    say(f"next: python main.py --config {folder / 'best.yaml'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_carry_out, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
