"""Train from Python: ``train(model="deit_small", data_path="pets", epochs=10)``.

It is the same run as ``python main.py --model deit_small --data-path pets --epochs 10``.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, resolve
from config.declared import all_options, by_key, nearest_option, option_key
from errors import Stopped, UserError, os_errors_in_words
from outputs.console import console
from training.options import options_of_checkpoint


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    folder: Path
    """Where everything is: checkpoints, log.txt, curves.png."""
    checkpoint: Path
    """The best weights, or the newest where none are the best; ``load_for_inference`` opens it."""
    metrics: dict[str, float]
    """Of the epoch of ``checkpoint``, by the names in log.txt: test_acc1, test_loss …; accuracies
    in %."""
    history: list[dict[str, Any]]
    """The entries of log.txt, one for each epoch."""
    finished: bool
    """Whether it is at its end; False where ``stop_at_epoch`` or ``stop_after`` came before."""


def train(**options: Any) -> Result:
    """Train as the options say; checked like a command line, of which each is a keyword.

    ``config="recipe.yaml"`` reads a file, which other keywords override. Lists stand for options
    of several values. The random numbers of the process are seeded by the run's ``seed``.

    Returns what the run has written; one that ``resume="auto"`` finds at its end trains nothing.

    Raises:
        UserError: as one line, what ``main.py`` prints: an option, the data, a full disk.
        KeyboardInterrupt: it was interrupted and is saved; ``resume="auto"`` goes on.
        SystemExit: another signal stopped it, also saved.
    """
    with console(), os_errors_in_words():
        given = _given(options)
        _refuse_other_work(given)
        config = resolve(given, options_of_checkpoint)
        _refuse_other_work(vars(config.run))
        from training.run import run

        try:
            code = run(config)
        except Stopped as stopped:
            code = stopped.exit_code
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt('resume="auto" goes on with what is saved')
        if code > 128:
            raise SystemExit(code)
        if code:
            raise UserError("the run is not saved as it should be: its messages say what is there")
        return _result(config)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their own names, with plain values. Raises UserError for an unknown one."""
    known, given = by_key(all_options()), {}
    for key, value in options.items():
        opt = known.get(option_key(key))
        if opt is None:
            raise UserError(f"unknown option {key}; {nearest_option(key)}")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif hasattr(value, "item") and not getattr(value, "ndim", 1):
            value = value.item()  # a number of NumPy's or torch's
        given[opt.name] = value
    return given


def _refuse_other_work(options: Mapping[str, Any]) -> None:
    """Raise UserError for what is no training."""
    for name in ("eval", "print_config"):
        if options.get(name):
            raise UserError(f"{name}: train() trains; this is done by main.py --{name}")


def _result(config: Config) -> Result:
    from checkpointing.files import load_checkpoint
    from checkpointing.folder import BEST, checkpoints_in
    from loggers import LOG_FILE, read_log
    from optimization.state import Progress
    from training.build import total_epochs
    from training.ending import out_of_patience
    from training.resume import output_folder

    folder = output_folder(config)
    best, history = folder / BEST, read_log(folder / LOG_FILE)
    newest = next(iter(checkpoints_in(folder)), best)
    checkpoint = best if best.exists() else newest
    epoch = load_checkpoint(checkpoint)["progress"]["epoch"]
    record = next((r for r in reversed(history) if r["epoch"] == epoch), {})
    metrics = {k: v for k, v in record.items() if k != "epoch" and isinstance(v, int | float)}
    progress = Progress.of(load_checkpoint(newest)["progress"])
    finished = progress.epoch >= total_epochs(config) or out_of_patience(config, progress)
    return Result(folder, checkpoint, metrics, history, finished)
