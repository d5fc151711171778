"""The space of a search: options, and the values to try for each."""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config
from config import Config
from errors import UserError, did_you_mean, shown

MOST_POINTS = 100_000  # of a grid


@dataclass(frozen=True)
class Axis:
    """An option, and the values to try: ``choices``, or from ``low`` to ``high``."""

    option: config.Option
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def keys(self) -> list[str]:
        """The choices as text, for Optuna takes no lists."""
        return [json.dumps(choice) for choice in self.choices]

    def draw(self, trial: Any) -> Any:
        """The value of an Optuna trial."""
        if self.choices:
            return json.loads(trial.suggest_categorical(self.name, self.keys))
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(
                self.name, int(self.low), int(self.high), step=step, log=self.log
            )
        value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return float(f"{value:.6g}")  # for who reads the recipe

    @property
    def whole(self) -> bool:
        """Whether the option takes whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> list[Any]:
        """All values, as Optuna stores them. Raises UserError where there is no end of them."""
        if self.choices:
            return self.keys
        if self.step is None and not self.whole:
            raise UserError(f"{self.name}: --sampler grid needs choices, or a step")
        step = self.step or 1
        steps = (self.high - self.low) / step  # beyond all floats for a step of next to nothing
        count = math.floor(steps + 1e-9) + 1 if math.isfinite(steps) else sys.maxsize
        if count > MOST_POINTS:
            raise UserError(
                f"{self.name}: a grid of {shown(count)} values, {MOST_POINTS:,} at most: raise its "
                "step"
            )
        return [self.low + i * step for i in range(count)]


def read_space(path: Path) -> list[Axis]:
    """The axes of a YAML file. Raises UserError for what is no option, or no value of it."""
    content = config.read_entries(path, "space")
    if not content:
        raise UserError(f"--space: {path}: expected 'option: {{low: …, high: …}}' lines")
    try:
        axes = [_axis(entry.key, entry.value) for entry in content]
    except UserError as error:
        raise UserError(f"--space: {path}: {error}") from None
    if len({axis.name for axis in axes}) < len(axes):
        raise UserError(f"--space: {path}: an option is there twice")
    return axes


def _axis(name: str, values: Any) -> Axis:
    if not config.is_option(name):
        known = [opt.name for opt in config.all_options()]
        hint = did_you_mean(name, known, otherwise="docs/options.md lists them")
        raise UserError(f"unknown option {shown(name)}; {hint}")
    opt = config.by_name(name)
    if opt.transient or opt.name in ("plugin", "device"):
        raise UserError(f"{opt.name} is no part of a recipe and can't be searched")
    if not isinstance(values, dict):
        values = {"choices": values}
    wrong = set(values) - {"choices", "low", "high", "step", "log"}
    if wrong or ("choices" in values) == bool({"low", "high"} & set(values)):
        raise UserError(
            f"{opt.name}: expected choices: […], or low and high (with step, or log: true)"
        )
    if "choices" in values:
        return _choices(opt, values)
    return _range(opt, values)


def _choices(opt: config.Option, values: Mapping[str, Any]) -> Axis:
    choices = values["choices"]
    if len(values) > 1 or not isinstance(choices, list) or not choices:
        raise UserError(f"{opt.name}: choices must be a list, with nothing beside it")
    converted = [config.convert(opt, choice) for choice in choices]
    return Axis(opt, tuple(list(c) if isinstance(c, tuple) else c for c in converted))


def _range(opt: config.Option, values: Mapping[str, Any]) -> Axis:
    if not {"low", "high"} <= set(values):
        raise UserError(f"{opt.name}: a range needs low and high")
    low, high = (config.convert(opt, values[end]) for end in ("low", "high"))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high))
    if not numbers:
        raise UserError(f"{opt.name}: {opt.type_name} has no range: give choices")
    if values.get("log", "false") not in ("true", "false"):
        raise UserError(f"{opt.name}: log must be true or false")
    log = values.get("log") == "true"
    try:
        step = float(values["step"]) if "step" in values else None
    except (TypeError, ValueError):
        raise UserError(f"{opt.name}: step must be a number, got {shown(values['step'])}") from None
    if not low < high or (step is not None and not 0 < step <= high - low):
        raise UserError(f"{opt.name}: low must be below high, and a step fit in between")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{opt.name}: log needs a low above 0, and takes no step")
    return Axis(opt, low=low, high=high, step=step, log=log)


def grid_points(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values, the last axis changing first. Raises UserError."""
    grids = [axis.grid() for axis in axes]
    if (count := math.prod(map(len, grids))) > MOST_POINTS:
        raise UserError(f"a grid of {count:,} points, {MOST_POINTS:,} at most: raise the steps")
    for values in itertools.product(*grids):
        yield {axis.name: value for axis, value in zip(axes, values, strict=True)}


def check_ends(config: Config, axes: Sequence[Axis]) -> None:
    """Raise UserError where one end of an axis is impossible beside the other options."""
    for axis in axes:
        for value in axis.choices or (axis.low, axis.high):
            config.replace("tune", **{axis.name: value})
