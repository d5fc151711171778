"""tools/torture/texts.py: small files that ask for much are refused before memory is spent."""

import time

import pytest

from tools.torture import texts

QUICK = (
    *("YAML: lists of aliases, 10⁹ values", "YAML: merges of aliases, 10⁹ keys"),
    *("YAML: a named pipe", "YAML: base: /dev/zero", "YAML: 250,000 opening brackets"),
    *("table: one line of 900 MB", "table: a sparse file of 60 GiB", "shard: label 10¹²"),
    *("shard: a .cls of 20 GiB", "shard: pax headers of 20 GiB", "IDX.gz: 2⁹⁶ bytes announced"),
    *("index: 10¹¹ labels in the header", "IDX.gz: 1 GiB announced, none there"),
)


@pytest.mark.parametrize("name", QUICK)
def test_a_hostile_file_takes_little(tmp_path, name):
    outcome = texts.measure(texts.CASES[name], tmp_path)
    assert outcome.ours, outcome
    assert outcome.growth < 64 << 20


def fails(folder):
    raise KeyError("x")


BROKEN = {
    "KeyError: 'x'": fails,
    "no end": lambda folder: time.sleep(60),
    "read": lambda folder: b"." * (60 << 20),
    "its process ended with 3": lambda folder: texts.os._exit(3),
}


def test_the_command_fails_where_a_promise_is_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "SECONDS", 0.1)
    monkeypatch.setattr(texts, "MEMORY", 32 << 20)
    cases = {answer: texts.Case(lambda folder: None, read) for answer, read in BROKEN.items()}
    cases["well"] = texts.Case(lambda folder: None, lambda folder: None)
    monkeypatch.setattr(texts, "CASES", cases)
    assert texts.main(["--folder", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("**broken**") == 4 and "5 files, 4 broken" in out
    for answer in BROKEN:
        assert f"**broken** {answer} |" in out
    assert texts.main(["--only", "well"]) == 0
