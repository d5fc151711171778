"""YAML as it is spelled: a value stays the text that the file has, and errors name the line.

YAML 1.1 makes numbers of ``2024_01_05`` and ``12:30:45``, 52 of ``064`` and a truth value of
``no``. Here only a bare ``null``, ``~`` or nothing is another value than its text, None; what a
text means is up to the option that gets it, as on the command line.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from errors import OptionError, os_error_text

_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
# A value can't begin with them, unless it is quoted.
_SPECIAL = "*&!%@`"


class Entry(NamedTuple):
    """A ``key: value`` of a file."""

    key: str
    value: Any
    """A text or None; lists and dictionaries of them."""
    line: int
    """Counted from 1."""
    inner: tuple["Entry", ...]
    """What a dictionary consists of."""


def read_entries(path: Path, option: str) -> list[Entry]:
    """The top level of a YAML file. Raises OptionError of ``option`` for any other file."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise OptionError(option, f"{path} does not exist") from None
    except OSError as error:
        raise OptionError(option, os_error_text(error, path)) from None
    except UnicodeDecodeError:
        raise OptionError(option, f"{path} isn't text in UTF-8: name a YAML file") from None
    loader = None
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _KEPT[0]):
            return []
        if not isinstance(node, yaml.MappingNode):
            raise OptionError(option, f"{path}: expected 'option: value' lines")
        written = [key.value for key, _ in node.value]
        values = loader.construct_document(node)
    except RecursionError:
        raise OptionError(option, f"{path}: nested too deeply") from None
    except yaml.YAMLError as error:
        raise OptionError(option, f"{path}{_place_and_problem(error, text)}") from None
    finally:
        if loader is not None:
            loader.dispose()
    # Of several equal keys the last would count, and nothing would say so.
    for key in written:
        if written.count(key) > 1:
            raise given_twice(option, path, key)
    return _entries(node, values)


def given_twice(option: str, path: Path, key: str) -> OptionError:
    """The error for a key that a file has more than once."""
    return OptionError(option, f"{path}: {key} is there twice")


def _entries(node: Any, values: dict[Any, Any]) -> list[Entry]:
    """The pairs of a mapping, whose keys have been merged."""
    nodes = {str(key.value): (key, value) for key, value in node.value}
    found = []
    for key, value in values.items():
        at, below = nodes["" if key is None else str(key)]
        inner = tuple(_entries(below, value)) if isinstance(value, dict) else ()
        found.append(Entry(str(key), value, at.start_mark.line + 1, inner))
    return found


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, to which a bare word is a text."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return Loader


def _place_and_problem(error: Any, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not valid YAML"
    if mark is None:
        return f": {problem}"
    place = f", line {mark.line + 1}, column {mark.column + 1}"
    return f"{place}: {problem}{_advice(problem, text.splitlines(), mark)}"


def _advice(problem: str, lines: Sequence[str], mark: Any) -> str:
    """What to do about a problem, where that is known."""
    line = lines[mark.line] if mark.line < len(lines) else ""
    near = line[max(mark.column - 1, 0) : mark.column + 1]
    if any(char in _SPECIAL for char in near):
        key, _, value = line.partition(":")
        begin = next(char for char in near if char in _SPECIAL)
        whole = value.strip().startswith(begin)
        example = f"{key.strip()}: '{value.strip()}'" if whole else f"'{begin}'"
        return f"; quote what begins with {begin}: {example}"
    if "\t" in line[: mark.column + 1]:
        return "; indent with spaces, not with tabs"
    if "mapping values" in problem:
        return "; quote a value that has a colon in it"
    return ""
