"""The declared options as records, and how to find one by its name."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from config.options import SECTIONS
from config.peers import all_peer_options, flags, names_elsewhere
from errors import did_you_mean

# ``int | None`` is the one, ``int | Literal["auto"]`` the other.
UNIONS = (types.UnionType, typing.Union)


@dataclass(frozen=True)
class Option:
    """One declared option, as the parser, the YAML check, the help and the docs read it."""

    name: str
    section: str
    title: str
    """The title of its section, for people."""
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    transient: bool
    """Whether the saved config leaves it out."""
    bounds: Mapping[str, Any]
    """``low``, ``above``, ``high``, ``below`` and ``length``, each None where there is none."""

    @property
    def flag(self) -> str:
        """Its name on the command line, e.g. ``--batch-size``."""
        return "--" + self.name.replace("_", "-")

    @property
    def type_name(self) -> str:
        """Its type for people, e.g. ``float``, ``error|skip`` or ``int|auto``; of one
        number or several, ``int …``."""
        names = _type_names(self.type)
        return "|".join(name for name in names if f"{name} …" not in names)

    @property
    def default_text(self) -> str:
        """Its default for people; empty where there is nothing to show."""
        return value_text(self.default)


def _type_names(tp: Any) -> list[str]:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is Literal:
        return [str(arg) for arg in args]
    if origin in UNIONS:
        return [name for arg in args for name in _type_names(arg)]
    if origin is tuple:
        return [f"{name} …" for name in _type_names(args[0])]
    return ["none" if tp is types.NoneType else tp.__name__]


def value_text(value: Any) -> str:
    """A value of an option for people; empty where there is nothing to show."""
    if isinstance(value, tuple | list):
        return " ".join(value_text(element) for element in value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return "none" if value is None else str(value)


@cache
def all_options() -> tuple[Option, ...]:
    """All options of a run, in the order of the help."""
    return tuple(opt for name, kind in SECTIONS.items() for opt in section_options(kind, name))


def section_options(kind: type, section: str) -> tuple[Option, ...]:
    """The options of one section, a dataclass whose docstring is its title."""
    types_of = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        bounds = dict(field.metadata)
        found.append(
            Option(
                name=field.name,
                section=section,
                title=kind.__doc__ or section,
                type=types_of[field.name],
                default=field.default,
                help=bounds.pop("help"),
                aliases=bounds.pop("aliases"),
                transient=bounds.pop("transient"),
                bounds=bounds,
            )
        )
    return tuple(found)


def by_name(name: str) -> Option:
    """The option of that name; hyphens, underscores, case and aliases don't matter."""
    return _all_by_key()[option_key(name)]


def is_option(name: str) -> bool:
    """Whether there is an option of that name."""
    return option_key(name) in _all_by_key()


def nearest_option(name: str) -> str:
    """Which option somebody means who writes ``name``, for the end of an error message."""
    return nearest_of(name, _all_by_key())


def nearest_of(name: str, known: Mapping[str, Option]) -> str:
    """As :func:`nearest_option`, among the ``known`` options of :func:`by_key`."""
    key = option_key(name)
    meant = option_key(names_elsewhere().get(key, ""))
    if meant in known:
        return f"did you mean {known[meant].flag}?"
    return _known_to_a_peer(key, known) or did_you_mean(
        key,
        known,
        shown=lambda key: known[key].flag,
        otherwise="--help lists them all",
    )


def _known_to_a_peer(key: str, known: Mapping[str, Option]) -> str:
    """What to do in place of an option that another program has; empty where none has it."""
    for opt in all_peer_options():
        if key not in (option_key(flag.lstrip("-")) for flag in flags(opt)):
            continue
        # It is read in a terminal.
        why = opt.why.replace("`", "")
        here = option_key(opt.here or opt.name)
        if here in known:
            return f"here it is {known[here].flag}" + (f": {why}" if why else "")
        return f"run_with_submitit.py takes --{here}" if opt.launcher else why
    return ""


def option_key(name: str) -> str:
    """What all spellings of an option's name have in common."""
    return name.replace("_", "-").lower()


def by_key(found: Sequence[Option]) -> dict[str, Option]:
    """The options by the key of each of their names."""
    return {option_key(name): opt for opt in found for name in (opt.name, *opt.aliases)}


@cache
def _all_by_key() -> dict[str, Option]:
    return by_key(all_options())
