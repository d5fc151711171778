"""The resolved options of a run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.channel_rules import leave_out_colours
from config.convert import convert
from config.declared import all_options, by_name
from config.files import read_yaml
from config.multilabel import fit_task
from config.options import (
    AugmentOptions,
    DataOptions,
    DistOptions,
    EmaOptions,
    LogOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    SaveOptions,
    ScheduleOptions,
)
from config.parser import get_parser
from config.rules import conflicts

DEFAULT = "default"
COMMAND_LINE = "command line"
CHECKPOINT = "checkpoint"
MODEL = "model"
FITTED = "--epochs"

CheckpointOptions = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The options that a checkpoint holds, from those of the config file and the command line."""


@dataclass(frozen=True)
class Config:
    """The resolved options, by section, with the origin of each."""

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    augment: AugmentOptions
    loss: LossOptions
    optim: OptimOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    save: SaveOptions
    log: LogOptions
    dist: DistOptions
    origin: Mapping[str, str]
    """Where each option is from: ``DEFAULT``, ``MODEL`` (the weights that the run starts from),
    ``CHECKPOINT``, ``COMMAND_LINE``, ``FITTED`` (to the number of epochs) or a file's path."""

    def flat(self) -> dict[str, Any]:
        """Every option by name, as plain YAML/JSON values."""
        return {opt.name: _plain(self._value(opt.section, opt.name)) for opt in all_options()}

    def recipe(self) -> dict[str, Any]:
        """The options that make the run what it is: all but the transient ones."""
        return {name: value for name, value in self.flat().items() if not by_name(name).transient}

    def explicit(self) -> frozenset[str]:
        """Names of the options that were set to something else than the default.

        A saved config spells out the defaults too; they count as not set.
        """
        return frozenset(
            opt.name
            for opt in all_options()
            if self.origin[opt.name] != DEFAULT
            and self._value(opt.section, opt.name) != opt.default
        )

    def given(self) -> frozenset[str]:
        """Names of the options of :meth:`explicit`, and of defaults that the command line has."""
        return self.explicit() | {n for n, where in self.origin.items() if where == COMMAND_LINE}

    def replace(self, origin: str, **values: Any) -> "Config":
        """A copy with the named options changed. Raises OptionError as :func:`from_flat`."""
        return from_flat(
            {**self.flat(), **values}, {**self.origin, **dict.fromkeys(values, origin)}
        )

    def _value(self, section: str, name: str) -> Any:
        return getattr(getattr(self, section), name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def from_flat(values: Mapping[str, Any], origin: Mapping[str, str]) -> Config:
    """A Config from options by name; what is missing takes its default.

    Raises OptionError for a value that its option can't have, and for an impossible combination.
    """
    sections: dict[str, dict[str, Any]] = {}
    origins = {}
    for opt in all_options():
        given = opt.name in values
        value = convert(opt, values[opt.name]) if given else opt.default
        sections.setdefault(opt.section, {})[opt.name] = value
        origins[opt.name] = origin.get(opt.name, DEFAULT) if given else DEFAULT
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    config = Config(
        **{name: kinds[name](**fields) for name, fields in sections.items()}, origin=origins
    )
    for error in conflicts(config):
        raise error
    return config


def load(
    argv: Sequence[str] | None = None, checkpoint_options: CheckpointOptions | None = None
) -> Config:
    """The Config of a command line.

    ``checkpoint_options`` is called with the options that the config file and the command line
    set. What it returns ranks between the defaults and the config file.
    """
    return resolve(vars(get_parser(defaults=False).parse_args(argv)), checkpoint_options)


def resolve(
    given: Mapping[str, Any], checkpoint_options: CheckpointOptions | None = None
) -> Config:
    """The Config of the options ``given`` on a command line; otherwise as :func:`load`."""
    layers = read_yaml(Path(given["config"])) if given.get("config") else []
    layers.append((COMMAND_LINE, dict(given)))
    if checkpoint_options:
        above = {name: value for _, layer in layers for name, value in layer.items()}
        layers.insert(0, (CHECKPOINT, dict(checkpoint_options(above))))
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, where)
    _fit_warmup(values, origin)
    fit_task(values, origin, COMMAND_LINE)
    leave_out_colours(values, origin)
    return from_flat(values, origin)


def _fit_warmup(values: dict[str, Any], origin: dict[str, str]) -> None:
    """Shorten a warm-up that takes more than half of ``--epochs``, and that nobody asked for.

    It is asked for on the command line, or where the epochs are from.
    """
    epochs, warmup = (
        convert(by_name(name), values[name]) if name in values else by_name(name).default
        for name in ("epochs", "warmup_epochs")
    )
    where = origin.get("warmup_epochs")
    asked = where is not None and where in (COMMAND_LINE, origin.get("epochs"))
    if not asked and 2 * warmup > epochs:
        values["warmup_epochs"], origin["warmup_epochs"] = epochs / 5, FITTED
