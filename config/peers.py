"""The options of DeiT's code and of timm's ``train.py``, and what they are here.

Their names and defaults are data, ``peer_options/*.yaml``. The tables of docs/coming-from-deit.md
and docs/coming-from-timm.md are made from them, and what the error says when one of their options
is given that has another name here, or none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "peer_options"
PEERS = {"deit": "DeiT", "timm": "timm's train.py"}
"""What people call the programs, by the name of their file."""


@dataclass(frozen=True)
class PeerOption:
    """One option of another program."""

    name: str
    """As it is spelled there, without the two hyphens before it."""
    also: tuple[str, ...] = ()
    """Its other names there; a short one, such as -b, with its hyphen."""
    default: Any = None
    here: str | None = None
    """The option that it is here, where that has another name."""
    why: str = ""
    """Why it differs or isn't here, and what to do; Markdown."""
    positional: bool = False
    """Whether it is given without its name."""
    launcher: bool = False
    """Whether it is of the program that starts a job on a cluster."""
    parsed: bool = True
    """False for what only the peer's documents name: its own parser refuses it."""


@cache
def peer_options(peer: str) -> tuple[PeerOption, ...]:
    """The options of one of ``PEERS``, in the order of its own help."""
    import yaml

    content = yaml.safe_load((FOLDER / f"{peer}.yaml").read_text(encoding="utf-8"))
    unparsed = content.get("unparsed", {})
    return (*_records(content["options"]), *_records(unparsed, parsed=False))


@cache
def names_elsewhere() -> dict[str, str]:
    """What options are often called in other programs, and the option that each means here."""
    import yaml

    content = yaml.safe_load((FOLDER / "elsewhere.yaml").read_text(encoding="utf-8"))
    return {name: option for option, names in content.items() for name in names}


def _records(content: dict[str, dict[str, Any]], *, parsed: bool = True) -> Iterator[PeerOption]:
    for name, fields in content.items():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        yield PeerOption(name, **values, parsed=parsed)


def flags(opt: PeerOption) -> list[str]:
    """All names of an option as they are written on the peer's command line."""
    if opt.positional:
        return [opt.name]
    return [name if name.startswith("-") else f"--{name}" for name in (opt.name, *opt.also)]


def all_peer_options() -> Iterator[PeerOption]:
    """Those of all peers."""
    for peer in PEERS:
        yield from peer_options(peer)
