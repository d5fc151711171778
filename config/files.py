"""Config files: YAML to options, and options to YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.convert import convert
from config.declared import all_options, by_name, is_option, nearest_option
from errors import OptionError, UserError

if TYPE_CHECKING:
    from config.config import Config

# They say which file to read and what to do with it, so a file doesn't hold them.
COMMAND_LINE_ONLY = ("config", "print_config")


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The options of a config file and the files it builds on, lowest precedence first.

    Returns (origin, {option: value}) pairs. ``base:`` is taken relative to the file that names it.
    Raises UserError that names the file and what is wrong with it.
    """
    path = path.expanduser()
    content = _parse(path)
    base = content.pop("base", None)
    below = [] if base is None else _read_base(path, str(base), _seen)
    return [*below, (str(path), _values(path, content))]


def _read_base(path: Path, base: str, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    seen = (*seen, path.resolve())
    base_path = (path.parent / base).resolve()
    if base_path in seen:
        raise OptionError("config", f"{path}: base: {base} leads back to itself")
    return read_yaml(base_path, seen)


def _parse(path: Path) -> dict[Any, Any]:
    """The key-value pairs of a YAML file, as they are written there."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise OptionError("config", f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("config", f"{path} can't be read: {error}") from None
    except RecursionError:
        raise OptionError("config", f"{path}: nested too deeply") from None
    except yaml.YAMLError as error:
        raise OptionError("config", f"{path}{_place_and_problem(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionError("config", f"{path}: expected 'option: value' lines")
    # safe_load keeps the last of several equal keys and says nothing.
    _refuse_repeated_keys(path, [key.value for key, _ in node.value])
    return content


def _place_and_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{place}: {getattr(error, 'problem', None) or 'not valid YAML'}"


def _refuse_repeated_keys(path: Path, keys: list[Any]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise _given_twice(path, key)


def _given_twice(path: Path, key: Any) -> OptionError:
    return OptionError("config", f"{path}: {key} is there twice")


def _values(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The options in the file's ``content``, each converted to its type."""
    values: dict[str, Any] = {}
    for key, raw in content.items():
        name = _option_name(path, key)
        if name in values:
            raise _given_twice(path, key)
        try:
            values[name] = convert(by_name(name), raw)
        except OptionError as error:
            raise UserError(f"{path}: {error}") from None
    return values


def _option_name(path: Path, key: Any) -> str:
    if not is_option(str(key)):
        raise OptionError("config", f"{path}: unknown option {key!r}; {nearest_option(str(key))}")
    name = by_name(str(key)).name
    if name in COMMAND_LINE_ONLY:
        raise OptionError(
            "config", f"{path}: {key} belongs on the command line; use base: to build on a file"
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
