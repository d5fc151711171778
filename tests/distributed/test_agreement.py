"""Words for who differs from whom."""

import pytest

from distributed.agreement import digest, disagreement, majority, refuse_differences
from distributed.processes import Processes
from errors import UserError


def test_most_are_right_and_else_the_lowest_rank():
    assert majority(["b", "a", "a"]) == "a"
    assert majority(["b", "a"]) == "b"
    assert majority(["c", "a", "b", "a", "b"]) == "a"


@pytest.mark.parametrize(
    "values, said",
    [
        ([1, 1, 1, 1], ""),
        ([1, 2], "rank 1 has 2, rank 0 has 1"),
        ([1, 2, 2, 2], "rank 0 has 1, ranks 1, 2, 3 have 2"),
        ([1, 2, 1, 3], "rank 1 has 2; rank 3 has 3, ranks 0, 2 have 1"),
    ],
)
def test_the_odd_ones_are_named(values, said):
    assert disagreement(values, Processes(), lambda value: f"has {value}") == said


def test_hosts_are_named():
    processes = Processes(0, 3, hosts=("a", "b", "b"))
    text = disagreement([1, 2, 1], processes, lambda value: f"has {value}")
    assert text == "rank 1 (host b) has 2, ranks 0, 2 (host a, b) have 1"


def refused(everyone: list[dict[str, str]], rank: int) -> str:
    """The message of ``rank``, whose exchanges give what each has in its turn."""
    rounds = []

    def exchange(value):
        rounds.append(value)
        if len(rounds) > 1:
            return everyone
        digests = [digest(each) for each in everyone]
        assert digests[rank] == value
        return digests

    try:
        refuse_differences(everyone[rank], exchange, Processes(), fix="mend it")
    except UserError as error:
        assert len(rounds) == 2
        return str(error)
    assert len(rounds) == 1  # the texts aren't exchanged
    return ""


def test_every_rank_says_the_same():
    common = {"--lr": "0.1", "--opt": "sgd"}
    assert refused([common, dict(reversed(common.items()))], 0) == ""
    everyone = [common, common | {"--lr": "0.2"}, common | {"code": "x"}]
    messages = {refused(everyone, rank) for rank in range(3)}
    assert messages == {
        "rank 1 has --lr 0.2, ranks 0, 2 have --lr 0.1; "
        "rank 2 has code x, ranks 0, 1 have code none: mend it"
    }
