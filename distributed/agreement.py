"""Who differs from whom: comparing what each process brings, and words for it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from distributed.processes import Processes
from errors import UserError

Value = TypeVar("Value", bound=Hashable)

MOST_SHOWN = 3  # differences in a message
_PLURAL = {"has": "have", "goes": "go", "starts": "start"}


def digest(value: Any) -> str:
    """A short text that is the same for equal ``value`` (of what JSON can hold) only."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def majority(values: Sequence[Value]) -> Value:
    """What most have; among equally many, what the lowest rank has."""
    # Counter keeps the order in which values came first.
    return Counter(values).most_common(1)[0][0]


def disagreement(values: Sequence[Value], processes: Processes, say: Callable[[Value], str]) -> str:
    """Which ranks differ in what, ``rank 2 (host b) has 3, the others have 4``; empty if none does.

    Args:
        values: of each rank.
        processes: for their hosts.
        say: what a rank has or does, beginning with a word of ``_PLURAL``: ``has 3``.
    """
    usual = majority(values)
    odd: dict[Value, list[int]] = {}
    for rank, value in enumerate(values):
        if value != usual:
            odd.setdefault(value, []).append(rank)
    if not odd:
        return ""
    others = [rank for rank, value in enumerate(values) if value == usual]

    def sentence(ranks: list[int], value: Value) -> str:
        verb, _, rest = say(value).partition(" ")
        return f"{processes.called(ranks)} {_PLURAL[verb] if len(ranks) > 1 else verb} {rest}"

    parts = [sentence(ranks, value) for value, ranks in odd.items()]
    shown = "; ".join(parts[:MOST_SHOWN]) + ("; …" if len(parts) > MOST_SHOWN else "")
    return f"{shown}, {sentence(others, usual)}"


def refuse_differences(
    mine: Mapping[str, str],
    exchange: Callable[[Any], list[Any]],
    processes: Processes,
    *,
    fix: str,
) -> None:
    """Raise UserError, on all ranks alike, unless each has the same texts under the same names.

    Digests are exchanged, and the texts only where those differ. To be called by all ranks.

    Args:
        mine: what this rank has: ``{"--lr": "0.1"}``.
        exchange: gives the value of every rank, in their order.
        processes: for their hosts.
        fix: what to do, the end of the message.
    """
    if len(set(exchange(digest(mine)))) == 1:
        return
    everyone = exchange(dict(mine))
    names = list(dict.fromkeys(name for each in everyone for name in each))
    found = []
    for name in names:
        values = [each.get(name, "none") for each in everyone]
        text = disagreement(values, processes, lambda value, name=name: f"has {name} {value}")
        found += [text] if text else []
    more = "; …" if len(found) > MOST_SHOWN else ""
    raise UserError(f"{'; '.join(found[:MOST_SHOWN])}{more}: {fix}")
