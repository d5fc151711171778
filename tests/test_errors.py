"""Errors that a user can fix, and the words of their messages."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from errors import (
    CheckpointError,
    DataError,
    DivergedError,
    OptionError,
    PeerError,
    UserError,
    did_you_mean,
    first_names,
    os_errors_in_words,
    printable,
    shortened,
    shown,
)

ROOT = Path(__file__).resolve().parent.parent
# docs/reliability.md lists them.
EXIT_CODES = [
    (UserError("wrong"), 2),
    (OptionError("lr", "wrong"), 2),
    (DataError("wrong"), 2),
    (CheckpointError("wrong"), 2),
    (DivergedError("wrong"), 3),
    (PeerError("wrong", 7), 7),
]


@pytest.mark.parametrize("error, code", EXIT_CODES, ids=lambda v: type(v).__name__)
def test_exit_codes(error, code):
    assert error.exit_code == code and isinstance(error, UserError)


def test_option_error_names_the_flag():
    error = OptionError("batch_size", "must be at least 1, got 0")
    assert str(error) == "--batch-size: must be at least 1, got 0"
    assert error.option == "batch_size" and error.message == "must be at least 1, got 0"


def test_option_error_travels_between_processes():
    error = OptionError("batch_size", "wrong")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is OptionError
    assert (again.option, again.message, str(again)) == ("batch_size", "wrong", str(error))


NAMES = ["adamw", "adam", "sgd"]


def test_did_you_mean_names_the_nearest():
    assert did_you_mean("admw", NAMES) == "did you mean adamw?"
    assert did_you_mean("admw", NAMES, most=2) == "did you mean adamw or adam?"
    assert did_you_mean("admw", NAMES, shown=str.upper) == "did you mean ADAMW?"


def test_did_you_mean_where_nothing_is_near():
    assert did_you_mean("xyz", NAMES) == ""
    assert did_you_mean("xyz", NAMES, otherwise="see the docs") == "see the docs"
    assert did_you_mean("adamv", NAMES, cutoff=0.99) == ""
    assert did_you_mean("adamv", []) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Köln 火 \U0001f63a", "Köln 火 \U0001f63a"),
        ("Köln\n", r"Köln\n"),
        ("\x1b[2J\x9b\x7f\t", r"\x1b[2J\x9b\x7f\t"),
        ("\u202egnp\u2066.exe\u2028\ufeff", r"\u202egnp\u2066.exe\u2028\ufeff"),
        ("c\u200bat c\u200dat", r"c\u200bat c\u200dat"),
        # A family, and a Persian word: joiners make them what they are.
        ("\U0001f469\u200d\U0001f467 می\u200cخواهم", "\U0001f469\u200d\U0001f467 می\u200cخواهم"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
    ],
)
def test_what_is_printed_is_what_is_seen(text, shown):
    assert printable(text) == shown


def test_first_names():
    assert first_names([]) == ""
    assert first_names(["a", "b"]) == "a, b"
    assert first_names(list("abcde")) == "a, b, c, d, e"
    assert first_names(list("abcdef")) == "a, b, c, d, e, …"
    assert first_names([1, 2, 3], most=2) == "1, 2, …"


HOST = """
import sys
{first}
sys.path.insert({place}, {root!r})
from inference import load_for_inference
"""


@pytest.mark.parametrize(
    "first, place, words",
    [
        ("", 0, None),
        ("import utils", 0, "was imported: import this first"),
        ("", 1, "comes first: put"),
    ],
)
def test_a_host_programs_module_of_our_name_is_named(tmp_path, first, place, words):
    (tmp_path / "utils.py").write_text("")
    code = HOST.format(first=first, place=place, root=str(ROOT))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode == 0) == (words is None), run.stderr
    if words:
        last = run.stderr.splitlines()[-1]
        assert last.startswith(
            f"ImportError: utils of {ROOT} can't be imported, {tmp_path}/utils.py"
        )
        assert words in last


def test_long_names_are_cut():
    assert shortened("a" * 300) == "a" * 300
    assert shortened("a" * 301) == "a" * 299 + "…"
    assert shortened("abcd", 3) == "ab…"
    assert first_names(["a" * 1000, "b"]) == "a" * 299 + "…, b"


def test_foreign_values_are_shown_short_and_at_once():
    assert shown("it's") == repr("it's") and shown([1, None]) == "[1, None]"
    endless: list[object] = []
    endless.append(endless)
    many: object = 1
    for _ in range(30):  # 10^30 elements
        many = [many] * 10
    for value in (endless, many, "x" * 10**6, b"x" * 10**6, 10**10000, {1: {2: {3: {4: {5: 6}}}}}):
        assert len(shown(value)) <= 300
    assert shown(10**400) == "a number of 1329 bits"
    assert shown(b"ab") == "b'ab'"


def test_a_home_of_nobody_is_an_error_of_the_user():
    with pytest.raises(UserError, match="~ and the name of no user"), os_errors_in_words():
        Path("~no-such-user/x").expanduser()
    with pytest.raises(RuntimeError, match="another"), os_errors_in_words():
        raise RuntimeError("another")
