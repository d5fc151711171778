"""YAML as it is spelled: a value stays the text that the file has, and errors name the line.

YAML 1.1 makes numbers of ``2024_01_05`` and ``12:30:45``, 52 of ``064`` and a truth value of
``no``. Here only a bare ``null``, ``~`` or nothing is another value than its text, None; what a
text means is up to the option that gets it, as on the command line.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import bounded
from errors import OptionError, os_error_text, shortened

MOST_BYTES = 256 << 10  # of a file; the longest recipe has 2 KiB
MOST_DEPTH = 50  # lists and mappings inside of each other
MOST_VALUES = 10_000  # of a file, each as often as its aliases repeat it
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_SPELLED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool"))
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


def read_entries(path: Path, option: str, *, pipes: bool = False) -> list[Entry]:
    """The top level of a YAML file; with ``pipes`` also of what a shell hands over.

    Raises OptionError of ``option`` for any other file, for one of more than ``MOST_BYTES``, and
    for one whose aliases repeat more than ``MOST_VALUES`` values.
    """
    import yaml

    with _parsed(path, option, _loader(), pipes) as (loader, node):
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _NULL):
            return []
        if not isinstance(node, yaml.MappingNode):
            raise OptionError(option, f"{path}: expected 'option: value' lines")
        _refuse_many_values(node, option, path)
        # Of several equal keys the last would count, and nothing would say so.
        for key, count in Counter(_key(key) for key, _ in node.value).items():
            if count > 1:
                raise given_twice(option, path, key)
        return _entries(loader, node)


def read_values(path: Path, option: str) -> Any:
    """What a YAML file holds, in plain values as YAML 1.1 has them; bounds and errors are those of
    :func:`read_entries`."""
    with _parsed(path, option, _bounded_loader()) as (loader, node):
        if node is None:
            return None
        _refuse_many_values(node, option, path)
        return loader.construct_document(node)


@contextmanager
def _parsed(
    path: Path, option: str, loader_type: type, pipes: bool = False
) -> Iterator[tuple[Any, Any]]:
    """A loader of a file and the file's node, None where it is empty; inside, errors of YAML are
    errors of ``option``."""
    import yaml

    try:
        if pipes and bounded.is_handed_pipe(path):
            text = bounded.read_pipe(path, MOST_BYTES).decode("utf-8-sig")
        else:
            text = bounded.read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise OptionError(option, f"{path} does not exist") from None
    except OSError as error:
        raise OptionError(option, os_error_text(error, path)) from None
    except UnicodeDecodeError:
        raise OptionError(option, f"{path} isn't text in UTF-8: name a YAML file") from None
    loader = None
    try:
        loader = loader_type(text)
        yield loader, loader.get_single_node()
    except yaml.YAMLError as error:
        raise OptionError(option, f"{path}{_place_and_problem(error, text)}") from None
    except (ValueError, OverflowError) as error:  # PyYAML's, of a character that there isn't
        raise OptionError(option, f"{path}: not valid YAML ({shortened(str(error))})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_many_values(root: Any, option: str, path: Path) -> None:
    """Raise OptionError for aliases that repeat too many values, or lead back to themselves."""
    counts: dict[int, int] = {}  # of the values in a node, with those its aliases repeat

    def count(node: Any) -> int:
        key = id(node)
        if counts.get(key) == 0:
            line = node.start_mark.line + 1
            raise OptionError(option, f"{path}, line {line}: an alias lies in what it repeats")
        if key not in counts:
            counts[key] = 0
            inner = node.value if isinstance(node.value, list) else ()
            pairs = (each if isinstance(each, tuple) else (each,) for each in inner)
            counts[key] = 1 + sum(count(value) for pair in pairs for value in pair)
        return counts[key]

    if (found := count(root)) > MOST_VALUES:
        raise OptionError(
            option,
            f"{path}: with what aliases repeat it holds {found:.3g} values, and no more than "
            f"{MOST_VALUES:,} are read",
        )


def given_twice(option: str, path: Path, key: str) -> OptionError:
    """The error for a key that a file has more than once."""
    return OptionError(option, f"{path}: {shortened(key)} is there twice")


def _entries(loader: Any, mapping: Any) -> list[Entry]:
    """The pairs of a mapping, of a key that is there twice the last, as those of merges are."""
    import yaml

    loader.flatten_mapping(mapping)
    found = {}
    for key, node in mapping.value:
        value = loader.construct_object(node, deep=True)
        inner = _entries(loader, node) if isinstance(node, yaml.MappingNode) else ()
        name = _key(key)
        found[name] = Entry(name, value, key.start_mark.line + 1, tuple(inner))
    return list(found.values())


def _key(node: Any) -> str:
    """A key as it is spelled."""
    from yaml.constructor import ConstructorError

    if not isinstance(node.value, str):
        raise ConstructorError(None, None, "a list or mapping is no name", node.start_mark)
    return node.value


@cache
def _loader() -> type:
    import yaml

    class Loader(_bounded_loader()):
        """To which a word is a text, whatever it is said to be."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
        # Without dates, sets and binary data, which no option takes.
        yaml_constructors = {
            _NULL: yaml.SafeLoader.construct_yaml_null,
            **dict.fromkeys(_SPELLED, yaml.SafeLoader.construct_scalar),
            "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
            "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
            None: yaml.SafeLoader.construct_undefined,
        }

    return Loader


@cache
def _bounded_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, with bounds."""

        depth = composed = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.composed += 1
            problem = ""
            # Beyond that the scanner's time grows with the square of the depth.
            if self.depth > MOST_DEPTH:
                problem = f"nested too deeply, {MOST_DEPTH} levels at most"
            elif self.composed > MOST_VALUES:
                problem = f"more than {MOST_VALUES:,} values"
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader


def _place_and_problem(error: Any, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = shortened(getattr(error, "problem", None) or "not valid YAML")
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
        example = shortened(f"{key.strip()}: '{value.strip()}'") if whole else f"'{begin}'"
        return f"; quote what begins with {begin}: {example}"
    if "\t" in line[: mark.column + 1]:
        return "; indent with spaces, not with tabs"
    if "mapping values" in problem:
        return "; quote a value that has a colon in it"
    return ""
