"""Drive a handful of images to zero loss, or say what keeps it from getting there.

    python -m tools.overfit --config configs/quickstart.yaml --overfit-batches 1

A model that can't learn a few images by heart will not learn many. The run's own parts are used
as --overfit-batches of main.py uses them: the same batches again and again, without augmentation,
mixing, dropout or smoothing, at the peak learning rate. When the loss stays up, the images and
labels are looked at, and the training is repeated with one thing changed at a time.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import engine
from checkpointing.files import MULTILABEL
from config import Config
from errors import UserError
from optimization.multilabel import MultiLabelEvaluation
from pipeline.dataset import Batch
from pipeline.sources.base import Target
from tools.common import command
from tools.common.stage import Rates, Trial, single_process
from training.run import overfitting

ZERO = 0.02  # share of the first loss that counts as zero
LEAST = 1e-3  # a loss that counts as zero whatever the first one was
SETTLING = 25  # updates between evaluations, once the loss is zero
READS = 3  # of each image, to see whether its label stays


@dataclass(frozen=True)
class Outcome:
    """What came of training on the few images."""

    first: float
    """Mean loss of the first pass."""
    last: float
    """That of the last one; NaN where a loss or gradient was not finite."""
    updates: int
    accuracy: float
    """On the same images, %, as evaluation has it; of several labels micro F1."""
    moved: float
    """How far the weights went, as a share of their norm."""
    trainable: float
    """Share of the weights that are trained."""

    @property
    def reached(self) -> bool:
        return _is_zero(self.last, self.first)

    def __str__(self) -> str:
        return (
            f"loss {self.first:.3g} to {self.last:.3g} in {self.updates} updates, "
            f"accuracy {self.accuracy:.0f} %"
        )


def _is_zero(loss: float, first: float) -> bool:
    return loss <= max(LEAST, ZERO * first)


def memorise(trial: Trial, updates: int) -> Outcome:
    """Train at the peak rate until the loss is zero, or for ``updates`` updates."""
    state = trial.state
    state.schedule = Rates(state.schedule.lr, state.schedule.lr, updates)
    before = [p.detach().clone() for p in state.model.parameters()]
    window, losses = min(trial.data.steps, updates), []

    def mean_of_pass() -> float:
        return sum(losses[-window:]) / window

    def at_zero() -> bool:
        return len(losses) >= window and _is_zero(mean_of_pass(), first())

    def first() -> float:
        return sum(losses[:window]) / window

    def note(report: engine.StepReport) -> None:
        losses.append(report.loss)

    last = accuracy = float("nan")
    try:
        trial.train(updates, report=note, done=at_zero)
        last, accuracy = mean_of_pass(), _accuracy(trial)
        # The statistics of batch norms come after the weights.
        while _is_zero(last, first()) and accuracy < 100 and len(losses) < updates:
            trial.train(min(SETTLING, updates - len(losses)), report=note)
            last, accuracy = mean_of_pass(), _accuracy(trial)
    except engine.NonFinite:
        last = float("nan")
    return Outcome(
        first=first() if len(losses) >= window else float("nan"),
        last=last,
        updates=state.progress.update,
        accuracy=accuracy,
        moved=_distance(before, list(state.model.parameters())),
        trainable=_share_trained(state.model),
    )


def _accuracy(trial: Trial) -> float:
    loader = trial.data.val_loader
    result = engine.evaluate(
        trial.state.model,
        loader,
        trial.settings,
        num_classes=len(trial.data.class_names),
        batch_size=loader.batch_size,
        counts=trial.counts(),
    )
    if not isinstance(result, MultiLabelEvaluation):
        return result.acc1
    # Also where no image has a label, which leaves no F1.
    wrong = np.abs(result.positives - result.hits) + np.abs(result.answers - result.hits)
    return result.scores()["micro_f1"] if wrong.any() else 100.0


def _distance(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """‖after − before‖ / ‖before‖ over all tensors."""
    changes = [(a.detach() - b).norm() for a, b in zip(after, before, strict=True)]
    norm = torch.stack([b.norm() for b in before]).norm()
    return float(torch.stack(changes).norm() / norm)


def _share_trained(model: torch.nn.Module) -> float:
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / total


# --- what is wrong --------------------------------------------------------------------------------


def data_problems(trial: Trial) -> Iterator[str]:
    """What is wrong with the few images and their labels, as they come from the loader."""
    batches: list[Batch] = list(trial.data.val_loader)
    images = torch.cat([trial.settings.inputs(b) for b in batches if len(b.targets)])
    targets = torch.cat([b.targets for b in batches])
    if not torch.isfinite(images).all():
        yield "input: pixels are not finite after preprocessing: see --mean and --std"
    elif float(images.std(0).max()) < 1e-4 and len(images) > 1:
        yield (
            f"input: all {len(images)} images are the same after preprocessing (std "
            f"between them {float(images.std(0).max()):.1g}): the model has nothing to go by"
        )
    else:
        yield from _contradictions(images, targets)
    source, changing = trial.data.train.source, []
    for index in range(len(source)):
        labels = {_comparable(source.read(index)[1]) for _ in range(READS)}
        if len(labels) > 1:
            changing.append((trial.data.train.sample_id(index), sorted(labels)))
    if changing:
        name, labels = changing[0]
        yield (
            f"labels: {len(changing)} of {len(source)} images have another label each time they "
            f"are read ({name}: {', '.join(map(str, labels))})"
        )


def _comparable(target: Target) -> int | tuple[int, ...]:
    """The class of an image, or which classes it has."""
    return target if isinstance(target, int) else tuple(np.asarray(target, int).tolist())


def _contradictions(images: torch.Tensor, targets: torch.Tensor) -> Iterator[str]:
    """Images that are equal but for their labels."""
    groups: dict[bytes, set[bytes]] = {}
    for image, target in zip(images, targets, strict=True):
        groups.setdefault(image.numpy().tobytes(), set()).add(target.numpy().tobytes())
    torn = sum(len(labels) > 1 for labels in groups.values())
    if torn:
        yield (
            f"labels: {torn} of {len(groups)} different images are there under more than one "
            "label, no model can know which is meant"
        )


def changes(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is suspected, options that take it out) for each part that can be exchanged."""
    if config.model.freeze or config.model.attn_only:
        yield "frozen model", {"freeze": (), "unfreeze_at": (), "attn_only": False}
    several = config.data.task == MULTILABEL
    plain = {
        "loss": "bce" if several else "ce",
        "pos_weight": "",
        "bce_loss": False,
        "cosub": False,
        "class_weights": "none",
        "distillation_type": "none",
        "teacher_path": "",
    }
    now = config.flat()
    if any(now[name] not in (value, "auto") for name, value in plain.items()):
        yield "loss", plain
    lr = config.optim.lr
    for factor in (10, 100, 1000, 0.1) if lr else ():
        name = "learning rate too low" if factor > 1 else "learning rate too high"
        yield name, {"lr": float(f"{factor * lr:.3g}")}
    if not lr:
        yield "learning rate too low", {"lr": 1e-3, "unscale_lr": True}


def flags(options: dict[str, Any], config: Config) -> str:
    """The options of ``options`` that differ from ``config``, as text."""
    now = config.flat()
    return ", ".join(
        f"{name}: {value if value not in ((), '') else 'none'}"
        for name, value in options.items()
        if now[name] != (list(value) if isinstance(value, tuple) else value)
        and (name, now[name]) != ("loss", "auto")
    )


def diagnose(config: Config, updates: int) -> bool:
    """Try it, and say what came of it; returns whether the loss reached zero."""
    config = config.replace(
        "overfit",
        overfit_batches=config.run.overfit_batches or 1,
        log_interval=1,
        on_nonfinite="stop",
        rollback_fp32_steps=0,
        accum_steps=1,
        # Whatever was asked for, every pass reads anew: a label that changes keeps the loss up.
        cache="none",
    )
    config = overfitting(config)
    with single_process(config) as (config, processes, device):

        def attempt(tried: Config) -> tuple[Trial, Outcome]:
            trial = Trial(tried, processes, device)
            return trial, memorise(trial, updates)

        trial, outcome = attempt(config)
        images = len(trial.data.train)
        print(f"{images} images, at most {updates} updates: {outcome}")
        if outcome.reached and outcome.accuracy == 100:
            print("fine: the model learns them by heart")
            return True
        if outcome.reached:
            suspects = [change for change in changes(config) if change[0] == "loss"]
            if not _exchange(config, outcome, suspects, attempt):
                print(_EVALUATION)
            return False
        found = [f"broken: {line}" for line in data_problems(trial)]
        if outcome.moved == 0:
            found.append(
                "broken: frozen model, or no gradient. No weight has changed; "
                f"{outcome.trainable:.0%} of them are set to be trained"
            )
        print("\n".join(found), end="\n" if found else "")
        # With broken data no change to the training would show anything.
        data_broken = any(line.startswith(("broken: input", "broken: labels")) for line in found)
        if not data_broken and not _exchange(config, outcome, list(changes(config)), attempt):
            print(_NOTHING_HELPED)
    return False


_EVALUATION = (
    "broken: evaluation. The training loss is zero, but in evaluation mode the model answers "
    "differently on the same images: batch norm with few or very different images, or layers "
    "that behave differently in training"
)
_NOTHING_HELPED = (
    "broken: none of these alone. The model may be too small for these images, need more "
    "--most-updates, or several things are wrong"
)


def _exchange(
    config: Config,
    outcome: Outcome,
    suspects: Sequence[tuple[str, dict[str, Any]]],
    attempt: Callable[[Config], tuple[Trial, Outcome]],
) -> bool:
    """Repeat the training with one thing changed at a time; says, and returns, whether it helps."""
    print(
        f"  as it is: --lr {config.optim.lr:g}, {outcome.trainable:.0%} of the weights trained, "
        f"they moved by {outcome.moved:.2g} of their norm"
    )
    helped: dict[str, str] = {}
    for name, options in suspects:
        if name in helped:
            continue
        changed = flags(options, config)
        # What is said of the options was said the first time.
        logging.disable(logging.INFO)
        try:
            _, tried = attempt(config.replace("overfit", **options))
        finally:
            logging.disable(logging.NOTSET)
        print(f"  {changed}: {tried}")
        if tried.reached and (tried.accuracy == 100 or not outcome.reached):
            helped[name] = changed
    for name, changed in helped.items():
        print(f"broken: {name}. With {changed} alone the loss reaches zero")
    return bool(helped)


def _carry_out(arguments: argparse.Namespace) -> int:
    if arguments.most_updates < 1:
        raise UserError("--most-updates: at least 1")
    return 0 if diagnose(arguments.config, arguments.most_updates) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 if the loss reaches zero, else 1."""
    arguments = command.run_parser("overfit", __doc__)
    arguments.add_argument(
        "--most-updates", type=int, default=300, metavar="N", help="of each try (default: 300)"
    )
    return command.run(_carry_out, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
