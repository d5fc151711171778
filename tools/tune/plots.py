"""The plots of a study."""

import itertools
import warnings
from pathlib import Path
from typing import Any

from tools.common import command


def plot_history(path: Path, study: Any, metric: str, lower_is_better: bool) -> None:
    """Draw the result of each trial of an Optuna ``study``, and the best so far."""
    states = command.require("optuna").trial.TrialState
    figure = command.require("matplotlib.figure", "matplotlib").Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    done = [t for t in study.trials if t.state == states.COMPLETE]
    numbers, values = [t.number for t in done], [t.value for t in done]
    best = list(itertools.accumulate(values, min if lower_is_better else max))
    axes.plot(numbers, values, "o", color="tab:blue", label="done")
    axes.step(numbers, best, where="post", color="tab:orange", label="best so far")
    pruned = [t for t in study.trials if t.state == states.PRUNED and t.intermediate_values]
    if pruned:
        last = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
        axes.plot(
            [t.number for t in pruned], last, "x", color="tab:gray", label="pruned, last value"
        )
    axes.set(xlabel="trial", ylabel=metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_importance(path: Path, study: Any, metric: str) -> None:
    """Draw what matters for a good result (PED-ANOVA, Watanabe et al. 2023).

    Nothing is drawn while there are too few trials to say.
    """
    optuna = command.require("optuna")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (UserWarning, ValueError, RuntimeError):
        return
    figure_module = command.require("matplotlib.figure", "matplotlib")
    figure = figure_module.Figure(figsize=(8, 0.4 * len(shares) + 1.2))
    axes = figure.add_subplot()
    bars = axes.barh(list(shares), list(shares.values()), color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=f"importance for a good {metric}", xlim=(0, 1.1))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from utils import written_whole

    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
