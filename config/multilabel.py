"""What ``--task multilabel`` changes of other options: their defaults, and what it rules out."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from config.convert import convert
from config.declared import by_name
from errors import OptionError

if TYPE_CHECKING:
    from config.config import Config

TASK = "--task"
"""The origin of an option that has the value of its task."""

# What nobody set. Smoothing moves absent labels off zero, of which there are many.
_DEFAULTS = {"best_metric": "test_map", "smoothing": 0.0}
# Sets that give each image one class.
_ONE_CLASS = ("IMNET", "CIFAR", "CIFAR10", "CIFAR100", "MNIST", "FMNIST", "INAT", "INAT19")
_ONE_CLASS += ("DIGITS",)


def is_multilabel(config: "Config") -> bool:
    """Whether images have any number of labels."""
    return config.data.task == "multilabel"


def fit_task(values: dict[str, Any], origin: dict[str, str], asked_in: str) -> None:
    """Give options that nobody set the value of their task.

    They are set on the command line (``asked_in``), where the task is from, or to another value
    than the default.
    """
    if values.get("task") != "multilabel":
        return
    for name, value in _DEFAULTS.items():
        opt, where = by_name(name), origin.get(name)
        asked = where in (asked_in, origin["task"]) if name in values else False
        if not asked and (name not in values or convert(opt, values[name]) == opt.default):
            values[name], origin[name] = value, TASK


def multilabel_conflicts(config: "Config") -> Iterator[OptionError]:
    """An error for each option that the task rules out."""
    if not is_multilabel(config):
        if config.loss.loss == "asl":
            yield OptionError("loss", "asl is for several labels per image: add --task multilabel")
        return
    yield from _of_data(config)
    yield from _of_loss(config)


def _of_data(config: "Config") -> Iterator[OptionError]:
    data = config.data
    name = data.data_set
    if name.upper() in _ONE_CLASS:
        yield OptionError(
            "data_set",
            f"{name} gives each image one class: for --task multilabel list the labels in a CSV "
            "file (--data-set CSV), or take wds/NAME, raw/NAME, hfds/NAME or tfds/NAME",
        )
    if data.label_columns and data.label_column:
        yield OptionError(
            "label_columns", "and --label-column both say where the labels are: leave one out"
        )
    if data.label_columns and data.label_separator:
        yield OptionError(
            "label_separator", "is for one column of labels: leave it or --label-columns out"
        )
    if data.sampler != "shuffle":
        yield OptionError(
            "sampler",
            f"{data.sampler} goes by the one class of an image: leave it out; --pos-weight "
            "balanced weighs rare labels in the loss",
        )
    for option in ("class_map", "valid_labels", "real_labels"):
        if getattr(data, option):
            yield OptionError(option, "is not for --task multilabel: leave it out")


def _of_loss(config: "Config") -> Iterator[OptionError]:
    loss = config.loss
    if loss.loss in ("ce", "focal"):
        yield OptionError(
            "loss",
            f"{loss.loss} takes classes to exclude each other: with --task multilabel use bce, "
            "asl or quality-focal",
        )
    if loss.class_weights != "none":
        yield OptionError(
            "class_weights",
            "weighs an image by its one class: with --task multilabel use --pos-weight",
        )
    if loss.loss == "asl" and (loss.bce_loss or loss.cosub):
        other = "bce_loss" if loss.bce_loss else "cosub"
        yield OptionError(other, "contradicts --loss asl: leave one out")
    weight = positive_number(loss.pos_weight)
    if weight is not None and not 0 < weight < math.inf:
        yield OptionError("pos_weight", f"{loss.pos_weight} is not above 0: give a larger number")


def positive_number(text: str) -> float | None:
    """The number that ``--pos-weight`` is; None where it is something else."""
    try:
        return float(text)
    except ValueError:
        return None
