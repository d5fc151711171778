"""Recipes that a tool recommends: YAML files that ``main.py --config`` takes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import config as options
from config import Config
from errors import UserError


def write(path: Path, config: Config, changes: Mapping[str, Any], note: str) -> None:
    """Write ``changes`` of ``config``'s run, on top of its config file and command line.

    The file builds on the config file by ``base:`` and holds the rest itself. It is replaced whole.
    Raises UserError where it can't be written.
    """
    base = config.run.config
    content: dict[str, Any] = {}
    if base:
        content["base"] = os.path.relpath(Path(base).expanduser(), path.parent)
    given = (options.COMMAND_LINE, options.CHECKPOINT)
    content |= {k: v for k, v in config.recipe().items() if config.origin[k] in given}
    content |= changes
    text = f"# {note}\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None
