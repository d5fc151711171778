"""Find a learning rate: train a little while the rate rises, and see where the loss falls fastest.

    python -m tools.lr_find --config configs/quickstart.yaml --output-dir output/quickstart
    python main.py --config output/quickstart/lr.yaml --output-dir output/quickstart

The range test of Smith (arXiv:1506.01186), with the run's own data, augmentation, loss and
optimiser. It prints a value for --lr, in the option's units: as --lr is scaled by the effective
batch unless --unscale-lr is given, so is the value. lr.yaml in the output directory builds on the
config with that value; lr.png shows the curve.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import engine
from config import Config
from errors import UserError
from optimization.optimizer import scaled_lr
from outputs.console import say
from tools.common import command, recipe
from tools.common.command import progress
from tools.common.stage import Rates, Trial, single_process
from training.build import effective_batch
from training.resume import make_writable, output_folder

DIVERGED = 4.0  # times the lowest smoothed loss
RECENT = 5  # updates over which divergence is measured


@dataclass(frozen=True)
class Suggestion:
    """What a range test says; rates as they are used, not as ``--lr`` takes them."""

    steepest: float
    """Where the smoothed loss falls fastest over the logarithm of the rate."""
    tenth: float
    """A tenth of the rate with the lowest smoothed loss."""
    smooth: np.ndarray
    """The smoothed losses, (N,)."""


def smoothed(losses: np.ndarray) -> np.ndarray:
    """A centred moving average over a tenth of the losses; narrower towards both ends."""
    half = max(1, len(losses) // 20)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    places = np.arange(len(losses))
    reach = np.minimum(half, np.minimum(places, len(losses) - 1 - places))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def suggest(rates: np.ndarray, losses: np.ndarray) -> Suggestion:
    """Where the loss falls fastest, and a tenth of where it is lowest.

    Args:
        rates: (N,), rising by the same factor.
        losses: (N,), each of the update that was made with its rate.

    Raises:
        UserError: the loss doesn't fall by more than its noise.
    """
    smooth = smoothed(losses)
    half = max(1, len(losses) // 20)
    # Nearer to the ends the average is narrow, and noise would look steep.
    inner = np.arange(half, len(losses) - half)
    if len(inner) < 3:
        raise UserError(f"the loss was lost after {len(losses)} updates: lower --from")
    lowest = inner[smooth[inner].argmin()]
    noise = np.std((losses - smooth)[: lowest + 1])
    if smooth[half] - smooth[lowest] <= max(6 * noise / math.sqrt(2 * half + 1), 1e-6):
        raise UserError(
            "the loss doesn't fall at any rate: widen --from and --to, or see what is broken with "
            "python -m tools.overfit"
        )
    # The slope over as many updates as the average, or noise would be the steepest.
    places = np.arange(half, lowest + 1)
    ahead, behind = places + half, places - half
    fall = (smooth[ahead] - smooth[behind]) / np.log(rates[ahead] / rates[behind])
    return Suggestion(float(rates[places[fall.argmin()]]), float(rates[lowest]) / 10, smooth)


def range_test(
    trial: Trial, lowest: float, highest: float, updates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train with rising rates until ``updates`` are made or the loss is lost; (rates, losses)."""
    trial.state.schedule = Rates(lowest, highest, updates)
    rates: list[float] = []
    losses: list[float] = []

    def note(report: engine.StepReport) -> None:
        rates.append(report.lr)
        losses.append(report.loss)
        next(bar, None)

    def diverged() -> bool:
        ends = [float(np.median(losses[i : i + RECENT])) for i in range(len(losses) - RECENT + 1)]
        return bool(ends) and ends[-1] > DIVERGED * min(ends)

    bar = iter(progress(range(updates), "range test"))
    # An update that isn't finite has reported nothing: what came before counts.
    with contextlib.suppress(engine.NonFinite):
        trial.train(updates, report=note, done=diverged)
    return np.array(rates), np.array(losses)


def plot(
    path: Path, rates: np.ndarray, losses: np.ndarray, found: Suggestion, unit: float, rule: str
) -> None:
    """Draw the losses over ``--lr``, whose unit is a rate of ``unit``."""
    figure = command.require("matplotlib.figure", "matplotlib").Figure(figsize=(8, 4.5))
    axes = figure.add_subplot()
    axes.plot(rates / unit, losses, color="tab:gray", alpha=0.4, label="loss of an update")
    axes.plot(rates / unit, found.smooth, color="tab:blue", label="smoothed")
    marks = (("steepest", found.steepest, "tab:red"), ("tenth", found.tenth, "tab:orange"))
    for name, rate, color in marks:
        title = "steepest descent" if name == "steepest" else "a tenth of the minimum"
        chosen = " (suggested)" if name == rule else ""
        label = f"{title}: --lr {rate / unit:.2g}{chosen}"
        axes.axvline(rate / unit, color=color, linestyle="-" if chosen else ":", label=label)
    # What comes after the minimum may be huge, and single losses are noisy.
    start, low = found.smooth[: len(losses) // 4].max(), found.smooth.min()
    margin = 0.4 * (start - low)
    axes.set(
        xscale="log", xlabel="--lr", ylabel="training loss", ylim=(low - margin, start + margin)
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    axes.grid(alpha=0.3)
    with command.written(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


def find(config: Config, lowest: float, highest: float, updates: int, rule: str) -> float:
    """Make the test, write ``lr.yaml`` and ``lr.png``; returns the value for ``--lr``."""
    folder = output_folder(config)
    make_writable(folder)
    # Every update is looked at, and a loss that isn't finite ends the test.
    tested = config.replace("lr_find", log_interval=1, on_nonfinite="stop", rollback_fp32_steps=0)
    with single_process(tested) as (tested, processes, device):
        trial = Trial(tested, processes, device)
        rates, losses = range_test(trial, lowest, highest, updates)
        batch = effective_batch(config, processes)
    found = suggest(rates, losses)
    unit = scaled_lr(1.0, batch, config.optim.unscale_lr)
    rate = found.steepest if rule == "steepest" else found.tenth
    value = float(f"{rate / unit:.2g}")
    plot(folder / "lr.png", rates, losses, found, unit, rule)
    recipe.write(folder / "lr.yaml", config, {"lr": value}, "Written by tools.lr_find.")
    print(f"steepest descent        --lr {found.steepest / unit:.2g}")
    print(f"a tenth of the minimum  --lr {found.tenth / unit:.2g}")
    how = "as given, --unscale-lr" if config.optim.unscale_lr else f"× {batch} / 512"
    print(f"suggested ({rule}): --lr {value:g}, a rate of {value * unit:.2g} ({how})")
    say(f"curve: {folder / 'lr.png'}")
    say(f"next: python main.py --config {folder / 'lr.yaml'}")
    return value


def _carry_out(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.lowest < arguments.highest:
        raise UserError("--from must be above 0 and below --to")
    if arguments.updates < 20:
        raise UserError("--updates: at least 20")
    find(
        arguments.config,
        arguments.lowest,
        arguments.highest,
        arguments.updates,
        arguments.rule,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.run_parser("lr_find", __doc__)
    arguments.add_argument(
        "--from",
        dest="lowest",
        type=float,
        default=1e-6,
        metavar="RATE",
        help="first rate, as it is used (default: 1e-6)",
    )
    arguments.add_argument(
        "--to",
        dest="highest",
        type=float,
        default=1.0,
        metavar="RATE",
        help="last rate, if the loss isn't lost before (default: 1)",
    )
    arguments.add_argument("--updates", type=int, default=300, help="at most (default: 300)")
    arguments.add_argument(
        "--rule",
        choices=("steepest", "tenth"),
        default="steepest",
        help="which value is suggested: steepest descent, or a tenth of the minimum",
    )
    return command.run(_carry_out, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
