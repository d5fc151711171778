"""Config files: YAML to options, and options to YAML."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.convert import convert
from config.declared import all_options, by_name, is_option, nearest_option
from config.keywords import KEYWORD_OPTIONS, as_pairs
from config.nested import flat_instead
from config.yaml_reader import Entry, given_twice, read_entries
from errors import OptionError, UserError, shortened, shown

if TYPE_CHECKING:
    from config.config import Config

# They say which file to read and what to do with it, so a file doesn't hold them.
COMMAND_LINE_ONLY = ("config", "print_config")
MOST_BASES = 20  # files that build on each other


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The options of a config file and the files it builds on, lowest precedence first.

    Returns (origin, {option: value}) pairs. ``base:`` is taken relative to the file that names it.
    Raises UserError that names the file and what is wrong with it.
    """
    path = Path(os.path.expanduser(path))
    content = read_entries(path, "config", pipes=not _seen)
    bases = [entry.value for entry in content if entry.key == "base" and entry.value is not None]
    below = _read_base(path, bases[0], _seen) if bases else []
    return [*below, (str(path), _values(path, [e for e in content if e.key != "base"]))]


def _read_base(path: Path, base: Any, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(base, str):
        raise OptionError("config", f"{path}: base: name one file, which may have a base: itself")
    if "\0" in base:
        raise OptionError("config", f"{path}: base: a name can't hold a NUL")
    seen = (*seen, Path(os.path.realpath(path)))
    base_path = Path(os.path.realpath(path.parent / base))
    if base_path in seen:
        raise OptionError("config", f"{path}: base: {shortened(base)} leads back to itself")
    if len(seen) > MOST_BASES:
        raise OptionError("config", f"{path}: base: more than {MOST_BASES} files lie below")
    return read_yaml(base_path, seen)


def _values(path: Path, content: list[Entry]) -> dict[str, Any]:
    """The options in the file's ``content``, each converted to its type."""
    values: dict[str, Any] = {}
    for entry in content:
        named = is_option(entry.key) and by_name(entry.key).name in KEYWORD_OPTIONS
        if entry.inner and not named:
            raise OptionError("config", f"{path}, line {entry.line}: {flat_instead(entry)}")
        name = _option_name(path, entry)
        if name in values:
            raise given_twice("config", path, entry.key)
        try:
            value = as_pairs(entry.value) if entry.inner else entry.value
            values[name] = convert(by_name(name), value)
        except OptionError as error:
            hint = (
                "" if entry.value is not None else "; leave the line out, or quote a name: 'null'"
            )
            raise UserError(f"{path}, line {entry.line}: {error}{hint}") from None
    return values


def _option_name(path: Path, entry: Entry) -> str:
    if not is_option(entry.key):
        raise OptionError(
            "config",
            f"{path}, line {entry.line}: unknown option {shown(entry.key)}; "
            f"{nearest_option(entry.key)}",
        )
    name = by_name(entry.key).name
    if name in COMMAND_LINE_ONLY:
        raise OptionError(
            "config",
            f"{path}: {entry.key} belongs on the command line; use base: to build on a file",
        )
    return name


def to_yaml(config: "Config", *, origins: bool = False, everything: bool = False) -> str:
    """The options as YAML that ``--config`` takes; with ``origins``, where each came from.

    ``everything`` includes the transient options.
    """
    values = config.flat() if everything else config.recipe()
    lines: list[str] = []
    section = None
    for opt in all_options():
        if opt.name not in values or opt.name in COMMAND_LINE_ONLY:
            continue
        if opt.section != section:
            section = opt.section
            lines += ["", f"# {opt.title}"] if lines else [f"# {opt.title}"]
        line = f"{opt.name}: {_yaml_value(values[opt.name])}"
        lines.append(f"{line:<40}  # {config.origin[opt.name]}" if origins else line)
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=4096)
    # After a bare value PyYAML ends the document with a line of dots.
    return text.removesuffix("...\n").strip()
