"""distributed/sharing.py: a value is made once on each machine, and its arrays lie there once."""

import os
from pathlib import Path

import numpy as np
import pytest
from runs import on_each_process

from distributed import sharing
from distributed.processes import Processes
from distributed.sharing import once_per_machine

WORLD = 3


class Numbers:
    """What a process has made: who made it, and an array."""

    def __init__(self, rank: int) -> None:
        self.maker = rank
        self.array = np.arange(1000) + rank


class Unpicklable(Numbers):
    def __reduce__(self):
        raise TypeError("holds a connection")


class KnownToItsMakerOnly(Numbers):
    def __setstate__(self, state):
        raise ImportError("a plug-in that isn't here")


def made(rank: int, kind: type[Numbers], place: str, **options) -> dict:
    calls = []

    def make() -> Numbers:
        calls.append(rank)
        return kind(rank)

    value = once_per_machine(Processes(rank, WORLD, rank, WORLD), make, (place,), **options)
    open_files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    held = sum("memfd:shared" in path for path in open_files)
    own = value.array.copy()
    value.array[0] = -rank  # seen by this process alone
    return {"maker": value.maker, "sum": int(own.sum()), "calls": len(calls), "held": held}


def result(maker: int, calls: int, held: int = 1) -> dict:
    return {"maker": maker, "sum": 499_500 + 1000 * maker, "calls": calls, "held": held}


OWN = [result(rank, 1, held=0) for rank in range(WORLD)]


@pytest.mark.parametrize(
    ("kind", "places", "wanted"),
    [
        (Numbers, "aaa", [result(0, 1), result(0, 0), result(0, 0)]),
        (Numbers, "abb", [result(0, 1, held=0), result(1, 1), result(1, 0)]),
        (Numbers, "abc", OWN),
        (Unpicklable, "aaa", OWN),
        (KnownToItsMakerOnly, "aaa", OWN),
    ],
    ids=["one place", "two places", "all differ", "unpicklable", "not known"],
)
def test_who_makes_it(tmp_path, kind, places, wanted):
    assert on_each_process(tmp_path, WORLD, lambda r: made(r, kind, places[r])) == wanted


def test_what_is_not_to_be_shared_is_made_by_each(tmp_path):
    own = {"shareable": lambda value: False}
    assert on_each_process(tmp_path, WORLD, lambda r: made(r, Numbers, "a", **own)) == OWN


def test_the_arrays_lie_in_one_file_without_a_name(tmp_path):
    """The maker's own as well: none keeps a copy."""

    def mapped(rank: int) -> list[str]:
        value = once_per_machine(Processes(rank, WORLD, rank, WORLD), lambda: Numbers(rank), ("a",))
        address = value.array.ctypes.data
        for line in Path("/proc/self/maps").read_text().splitlines():
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            if begin <= address < end:
                return line.split()[4:6]
        return []

    places = on_each_process(tmp_path, WORLD, mapped)
    assert places[0] == places[1] == places[2] and "memfd:shared" in places[0][1]


def test_a_process_of_the_same_number_elsewhere_is_not_trusted():
    """As in a container with numbers of its own."""
    offer = sharing._offered(Numbers(5))
    assert sharing._taken_over(offer)[0].maker == 5
    assert sharing._taken_over(offer._replace(token=b"x" * 16)) is None
    os.close(offer.descriptor)
    assert sharing._taken_over(offer) is None


def test_one_process_alone_makes_its_own():
    assert once_per_machine(Processes(), lambda: 7, ("a",)) == 7
