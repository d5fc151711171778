"""Values from the texts of the command line and of YAML: types, ranges, lengths."""

import pytest

from config import Option, all_options, by_name, convert
from errors import OptionError


def in_tuple(opt: Option, value: float):
    """``value`` as an element of a tuple that is long enough, where the option is a tuple."""
    least = (opt.bounds["length"] or (1, 1))[0]
    return [value] * least if "…" in opt.type_name else value


BOUNDS = [
    (opt, kind, opt.bounds[kind])
    for opt in all_options()
    for kind in ("low", "above", "high", "below")
    if opt.bounds[kind] is not None
]


@pytest.mark.parametrize("opt, kind, bound", BOUNDS, ids=lambda v: getattr(v, "name", None))
def test_every_bound_holds(opt, kind, bound):
    step = 1 if "float" not in opt.type_name else 1e-6
    inside = bound + step if kind in ("low", "above") else bound - step
    outside = bound - step if kind in ("low", "above") else bound + step
    convert(opt, in_tuple(opt, inside))
    with pytest.raises(OptionError, match=f"{opt.flag}: must be "):
        convert(opt, in_tuple(opt, outside))
    if kind in ("low", "high"):
        convert(opt, in_tuple(opt, bound))
    else:
        with pytest.raises(OptionError, match=f"{opt.flag}: must be {kind} "):
            convert(opt, in_tuple(opt, bound))


LENGTHS = [opt for opt in all_options() if opt.bounds["length"]]


@pytest.mark.parametrize("opt", LENGTHS, ids=lambda o: o.name)
def test_lengths_of_tuples(opt):
    least, most = opt.bounds["length"]
    value = 8 if opt.name == "input_size" else 0.5
    for count in range(least, most + 1):
        # Where one number can stand for all, it is kept as one.
        assert convert(opt, [value] * count) in ((value,) * count, value)
    for count in (least - 1, most + 1):
        if count:
            with pytest.raises(OptionError, match=f"{opt.flag}: takes .*got {count}"):
                convert(opt, [value] * count)


def test_one_number_stands_for_three_and_not_for_four():
    jitter = by_name("color_jitter")
    assert convert(jitter, "0.4") == convert(jitter, [0.4]) == 0.4
    assert convert(jitter, "0.4 0.4 0.4") == (0.4,) * 3
    assert convert(jitter, [0.4, 0.4, 0.4, 0.4]) == (0.4,) * 4
    assert convert(jitter, "none") is None


WRONG = [
    ("lr", "fast"),
    ("lr", True),
    ("lr", "nan"),
    ("lr", "inf"),
    ("lr", [0.1]),
    ("lr", None),
    ("epochs", 2.5),
    ("epochs", "three"),
    ("epochs", "inf"),
    ("epochs", True),
    ("repeated_aug", "maybe"),
    ("repeated_aug", 2),
    ("sched", "linear"),
    ("amp", True),
    ("num_workers", "many"),
    ("scale", "a b"),
    ("scale", {"low": 1}),
    ("model", ["a"]),
    ("model", True),
    ("clip_grad", "some"),
]


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_type_names_the_option_and_what_it_expects(name, value):
    opt = by_name(name)
    with pytest.raises(OptionError, match=f"^{opt.flag}: expected ") as caught:
        convert(opt, value)
    assert opt.type_name in str(caught.value) and repr(value) in str(caught.value)


HOSTILE = [
    ("lr", 10**400, "expected float, got a number of 1329 bits"),
    ("lr", "9" * 10**6, "expected float, got '999"),
    ("epochs", "9" * 300, "must be a number of 64 bits, got a number of 997 bits"),
    ("seed", 2**63, "must be "),
    ("seed", b"1", "expected int, got b'1'"),
    ("data_path", "a\0b", r"holds a NUL, 'a\x00b': remove it"),
    ("data_path", "\ud800", r"isn't valid Unicode, '\ud800': correct it"),
    ("data_path", "x" * 10_001, "has 10,001 characters: 10,000 at most"),
    ("data_path", b"x", "expected str, got b'x'"),
    ("sched", {"a": ["b"] * 1000}, "expected cosine"),
    ("repeated_aug", [[[[0] * 9] * 9] * 9] * 9, "expected bool"),
]


@pytest.mark.parametrize("name, value, message", HOSTILE)
def test_a_hostile_value_is_refused_in_a_short_line(name, value, message):
    with pytest.raises(OptionError) as caught:
        convert(by_name(name), value)
    assert caught.value.message.startswith(message)
    assert len(str(caught.value)) < 600


def test_a_value_that_deit_knows_is_answered_with_what_to_take():
    with pytest.raises(OptionError, match=r"--sched: expected cosine.*, got 'tanh': take cosine$"):
        convert(by_name("sched"), "tanh")
    with pytest.raises(OptionError, match=r"got 'linear'$"):
        convert(by_name("sched"), "linear")


RIGHT = [
    ("lr", "1e-3", 1e-3),
    ("lr", 1, 1.0),
    ("epochs", "1e2", 100),
    ("epochs", 3.0, 3),
    ("epochs", "9007199254740993", 2**53 + 1),
    ("seed", "4294967295", 2**32 - 1),
    ("amp", False, "off"),
    ("amp", "off", "off"),
    ("repeated_aug", "off", False),
    ("repeated_aug", 1, True),
    ("repeated_aug", "Yes", True),
    ("aa", "none", None),
    ("aa", None, None),
    ("aa", "trivial", "trivial"),
    ("aa", "", None),
    ("clip_grad", "None", None),
    ("clip_grad", "5", 5.0),
    ("num_workers", "auto", "auto"),
    ("num_workers", "0", 0),
    ("scale", "0.2 1", (0.2, 1.0)),
    ("scale", "0.2,1", (0.2, 1.0)),
    ("mean", 0.5, (0.5,)),
    ("freeze", "head", ("head",)),
    ("plugin", "my folder/a.py", ("my folder/a.py",)),
    ("model", 5, "5"),
    ("sched", "poly", "poly"),
]


@pytest.mark.parametrize("name, raw, value", RIGHT)
def test_values_are_read_as_people_write_them(name, raw, value):
    converted = convert(by_name(name), raw)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize("name, value", [("mean", [123.675, 116.28, 103.53]), ("std", "58.4")])
def test_normalisation_of_bytes_is_told_apart(name, value):
    with pytest.raises(OptionError, match=f"--{name}: must be at most 1.*0–255, divide it by 255"):
        convert(by_name(name), value)
