"""Recipes: those that a tool recommends, YAML files for ``main.py --config``, and a run's own."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from config import CHECKPOINT, COMMAND_LINE, Config, by_name, is_option
from tools.common import command


def write(path: Path, config: Config, changes: Mapping[str, Any], note: str) -> None:
    """Write ``changes`` of ``config``'s run, on top of its config file and command line.

    The file builds on the config file by ``base:`` and holds the rest itself. It is replaced whole.
    Raises UserError where it can't be written.
    """
    base = config.run.config
    content: dict[str, Any] = {}
    if base:
        content["base"] = os.path.relpath(Path(base).expanduser(), path.parent)
    given = (COMMAND_LINE, CHECKPOINT)
    content |= {k: v for k, v in config.recipe().items() if config.origin[k] in given}
    content |= changes
    text = f"# {note}\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    command.write_text(path, text)


def is_off_default(name: str, value: object) -> bool:
    """Whether an option of a run differs from its default; those unknown today do."""
    if not is_option(name):
        return True
    default = by_name(name).default
    return value != (list(default) if isinstance(default, tuple) else default)
