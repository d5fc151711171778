"""What a tracker is told of a run, and what it is asked for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from errors import without_surrogates

# A name and password before a host, and what follows a path, may open what the address leads to.
# A bound on the scheme keeps the search of a long word from taking the square of its length.
_USER = re.compile(r"(\w[\w+.-]{0,40}://)[^/?#\s]*@")
_QUERY = re.compile(r"(\w[\w+.-]{0,40}://[^?#\s]*)[?#]\S*")


@dataclass(frozen=True)
class RunInfo:
    """A run as trackers know it."""

    project: str
    name: str
    key: str
    """Of this run alone, the same in all its sessions."""
    folder: Path
    """Where the run is written."""
    options: Mapping[str, Any]
    """The options by name, as plain values."""
    went_on: bool = False
    """Whether an earlier session may have been tracked."""


class Tracker(Protocol):
    """A run that is open in a tracker. Its methods may raise anything and take any time.

    Attributes:
        last: the last update that an earlier session logged there, as far as is known; else 0.
        place: where the run is found, for a person.
    """

    last: int
    place: str

    def log(self, values: Mapping[str, float], update: int) -> None:
        """Add values by their names, of one update."""

    def close(self, *, finished: bool) -> None:
        """Send what is left; ``finished``: the run has reached its end."""


def without_secrets(value: Any) -> Any:
    """``value``, at any depth, in which addresses have lost users, passwords and queries."""
    if isinstance(value, Mapping):
        return {name: without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    if isinstance(value, str):
        return _QUERY.sub(r"\1", _USER.sub(r"\1", without_surrogates(value)))
    return value
