"""Config files: what is read from YAML, what is wrong with it, and what is written.

Also of config/yaml_reader.py.
"""

import contextlib
import itertools
import os
import socket
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from config import COMMAND_LINE, DEFAULT, all_options, from_flat, load, read_yaml, to_yaml
from errors import OptionError, UserError

# --- reading --------------------------------------------------------------------------------------


def test_numbers_and_words_of_yaml(write_yaml):
    text = "lr: 1e-3\namp: off\nrepeated-aug: no\naa: none\nweight_decay: 1E-8\nscale: [0.1, 1]\n"
    c = load(["--config", write_yaml(text)])
    assert c.optim.lr == 1e-3 and c.optim.amp == "off" and c.optim.weight_decay == 1e-8
    assert c.augment.repeated_aug is False and c.augment.aa is None
    assert c.augment.scale == (0.1, 1.0)


def test_texts_with_spaces_stay_whole(write_yaml):
    path = write_yaml("plugin: my folder/mine.py\n")
    assert load(["--config", path]).run.plugin == ("my folder/mine.py",)


def test_base_files_come_first(write_yaml):
    base = write_yaml("lr: 1\nseed: 2\n", "base.yaml")
    top = write_yaml("base: ../base.yaml\nseed: 3\n", "sub/top.yaml")
    (first, lowest), (second, highest) = read_yaml(Path(top))
    assert Path(first).samefile(base) and second == top
    assert lowest == {"lr": 1.0, "seed": 2} and highest == {"seed": 3}


BAD_FILES = [
    ("warmup_epocs: 3", "line 1: unknown option 'warmup_epocs'; did you mean --warmup-epochs"),
    ("qqqq: 3", "unknown option 'qqqq'; --help"),
    ("seed: 1\nlr: fast", "line 2: --lr: expected float, got 'fast'"),
    ("mixup_prob: 3", "--mixup-prob: must be at most 1, got 3"),
    ("scale: [0.1]", "--scale: takes 2 values, got 1"),
    ("- lr\n- seed", "expected 'option: value' lines"),
    ("lr: [1", "line 1"),
    ("a: b: c", "line 1, column"),
    ("lr: 1\nepochs: 10\nlr: 2", "lr is there twice"),
    ("batch_size: 3\nbatch-size: 4", "batch-size is there twice"),
    ("lr: 1" + "0" * 400, "--lr: expected float"),
    ("config: other.yaml", "config belongs on the command line; use base:"),
    ("base: missing.yaml", "missing.yaml does not exist"),
    ("base: [a.yaml, b.yaml]", "base: name one file"),
    ("base:\n  lr: 1", "base: name one file"),
    ("base: c.yaml", "leads back to itself"),
    ("[" * 2_000, "nested too deeply"),
]


@pytest.mark.parametrize("text, message", BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_bad_file_is_named_with_its_fault(write_yaml, text, message):
    path = write_yaml(text)
    with pytest.raises(UserError) as caught:
        load(["--config", path])
    assert message in str(caught.value) and str(Path(path).parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def doubled(line: str) -> str:
    """Nine lines, each of which repeats the one before ten times."""
    names = "abcdefghi"
    lines = [line.format(name, ", ".join([f"*{o}"] * 10)) for o, name in itertools.pairwise(names)]
    return "\n".join(["a: &a {k: 1}", *lines])


MANY_VALUES = "with what aliases repeat it holds .* values, and no more than 10,000 are read$"
HOSTILE = {
    "lists of aliases": (doubled("{0}: &{0} [{1}]"), MANY_VALUES),
    "merges of aliases": (doubled("{0}: &{0} {{{{<<: [{1}]}}}}"), MANY_VALUES),
    "an alias of itself": ("scale: &a [1, *a]", "line 1: an alias lies in what it repeats"),
    "no character": ('model: "\\UFFFFFFFF"', "not valid YAML"),
    "half a character": ('data_path: "\\ud800"', "isn't valid Unicode"),
    "a NUL": ('data_path: "a\\0b"', "holds a NUL"),
    "base with a NUL": ('base: "a\\0b"', "a name can't hold a NUL"),
    "version": (f"%YAML {'9' * 5000}.1\n---\nlr: 1", "not valid YAML"),
    "a date": ("model: !!timestamp 2024-01-01", "could not determine a constructor"),
    "bytes": ("model: !!binary aGk=", "could not determine a constructor"),
    "code": ("model: !!python/name:os.system", "could not determine a constructor"),
    "a key that is a list": ("? [a]\n: 1", "a list or mapping is no name"),
    "a long key": (f"{'k' * 1000}: 1", "unknown option 'kkk"),
    "a long number": (f"lr: {'9' * 200_000}", "--lr: expected float, got '999"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(5100)), "line 5000, .*more than 10,000"),
    "a long file": ("#" * 300_000, "293 KiB, and no more than 256 KiB is read"),
    "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(200)), "nested too deeply"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_a_short_line(write_yaml, name):
    text, message = HOSTILE[name]
    path = write_yaml(text)
    with pytest.raises(UserError, match=message) as caught:
        load(["--config", path])
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_aliases_of_few_values_are_read(write_yaml):
    text = "lr: &x 0.1\nwarmup_lr: *x\nscale: &s [*x, 0.5]\nratio: *s\n<<: {seed: 7}\n"
    c = load(["--config", write_yaml(text)])
    assert c.optim.lr == c.schedule.warmup_lr == 0.1 and c.run.seed == 7
    assert c.augment.scale == c.augment.ratio == (0.1, 0.5)


def test_a_number_with_a_tag_is_its_text(write_yaml):
    c = load(["--config", write_yaml("seed: !!int 012\n!!str lr: !!float 1_0\n")])
    assert c.run.seed == 12 and c.optim.lr == 10


@pytest.mark.parametrize("as_base", [False, True])
def test_only_regular_files_are_read(tmp_path, write_yaml, as_base):
    pipe, sparse = tmp_path / "pipe", tmp_path / "sparse"
    os.mkfifo(pipe)
    with open(sparse, "wb") as file:
        file.truncate(10 << 30)
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(tmp_path):
        listening.bind("socket")
    kinds = {pipe: "a named pipe", "/dev/zero": "a device", tmp_path / "socket": "a socket"}
    kinds |= {sparse: "10 GiB, and no more than 256 KiB is read", tmp_path: "Is a directory"}
    for path, kind in kinds.items():
        with pytest.raises(OptionError, match=kind):
            load(["--config", write_yaml(f"base: {path}") if as_base else str(path)])


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd")
def test_a_shell_may_hand_a_file_over(write_yaml):
    def handed(text: bytes, name: str = "{}") -> str:
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb") as file:
            file.write(text)
        return name.format(f"/dev/fd/{reader}")

    assert load(["--config", handed(b"lr: 0.25\n")]).optim.lr == 0.25
    with pytest.raises(OptionError, match="isn't text"):
        read_yaml(Path(handed(b"\xff")))
    with pytest.raises(OptionError, match="pipe"):
        read_yaml(write_yaml(handed(b"lr: 0.25\n", "base: {}\n")))


def test_a_long_chain_of_files_is_refused(write_yaml):
    for number in range(30):
        path = write_yaml(f"base: {number + 1}.yaml", f"{number}.yaml")
    with pytest.raises(OptionError, match="base: more than 20 files lie below"):
        read_yaml(Path(path).with_name("0.yaml"))


def test_base_files_may_not_go_in_circles(write_yaml):
    path = write_yaml("base: b.yaml", "a.yaml")
    write_yaml("base: a.yaml", "b.yaml")
    with pytest.raises(OptionError, match="leads back to itself"):
        read_yaml(Path(path))


def test_unreadable_files(tmp_path):
    with pytest.raises(OptionError, match=r"--config: .*does not exist"):
        load(["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(OptionError, match="Is a directory.*name a file"):
        load(["--config", str(tmp_path)])
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(OptionError, match="--config"):
        load(["--config", str(tmp_path / "bin.yaml")])


def test_empty_file_changes_nothing(write_yaml):
    c = load(["--config", write_yaml("# nothing\n")])
    assert c.recipe() == load([]).recipe()


# --- writing --------------------------------------------------------------------------------------


def values(tp, bounds) -> st.SearchStrategy:
    """What an option of that type may be."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    low = bounds["low"] if bounds["low"] is not None else bounds["above"]
    high = bounds["high"] if bounds["high"] is not None else bounds["below"]
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values(arg, bounds) for arg in args])
    if origin is tuple:
        least, most = bounds["length"] or (0, 3)
        return st.lists(values(args[0], bounds), min_size=least, max_size=most).map(tuple)
    if tp is types.NoneType:
        return st.none()
    if tp is bool:
        return st.booleans()
    if tp is int:
        return st.integers(int(low or 0), int(high or 10**6))
    if tp is float:
        ends = {"exclude_min": bounds["above"] is not None}
        ends["exclude_max"] = bounds["below"] is not None
        return st.floats(low or 0.0, 1e6 if high is None else high, **ends)
    text = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1)
    return text.filter(lambda word: word.lower() not in ("none", "null"))


# Drawn one at a time, so that few of them conflict.
FREE = [opt for opt in all_options() if opt.name not in ("config", "print_config", "best_metric")]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_saved_yaml_comes_back_as_it_was(tmp_path_factory, data):
    opt = data.draw(st.sampled_from(FREE))
    value = data.draw(values(opt.type, opt.bounds))
    try:
        c = from_flat({opt.name: value}, {opt.name: "test"})
    except OptionError:
        reject()
    one = {"input_size": lambda sides: len(set(sides)) == 1, "color_jitter": lambda c: len(c) == 1}
    if isinstance(value, tuple) and one.get(opt.name, lambda _: False)(value):
        value = value[0]  # one number stands for as many equal ones
    assert getattr(getattr(c, opt.section), opt.name) == value
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(to_yaml(c, origins=True, everything=True), encoding="utf-8")
    again = load(["--config", str(path)])
    assert again.flat() | {"config": ""} == c.flat()


def test_saved_yaml_leaves_out_what_is_not_the_recipe():
    argv = ["--output-dir", "x", "--lr", "0.25", "--eval", "--resume", "r.pth"]
    saved = yaml.safe_load(to_yaml(load(argv)))
    assert saved["lr"] == 0.25 and saved["opt"] == "adamw"
    transient = {opt.name for opt in all_options() if opt.transient}
    assert {"output_dir", "resume", "eval", "config", "start_epoch"} <= transient
    assert not transient & set(saved)
    assert set(saved) == {opt.name for opt in all_options()} - transient


def test_origins_are_comments(write_yaml):
    path = write_yaml("epochs: 12\n")
    lines = to_yaml(load(["--config", path, "--lr", "0.1"]), origins=True).splitlines()
    options = [line for line in lines if line and not line.startswith("#")]
    found = {line.split(":")[0]: line.split("  # ")[1] for line in options}
    assert found["lr"] == COMMAND_LINE and found["epochs"] == path and found["opt"] == DEFAULT


# --- spelling -------------------------------------------------------------------------------------

SPELLED = (
    *("2024_01_05", "1.10", "0x1F", "12:30:45", "064", "1_0", "0o17", ".5", "+1", "1e3", "1."),
    *("yes", "no", "on", "off", "Yes", "NO", "y", "n", "true", "False", ".inf", ".nan", "=", "~x"),
    *("2024-01-05", "2024-01-05 10:00:00", "null_", "none", "0b11", "190:20:30", "1,000"),
)


@pytest.mark.parametrize("text", SPELLED)
def test_a_text_stays_as_it_is_spelled(write_yaml, text):
    c = load(["--config", write_yaml(f"output_dir: {text}\nfreeze: [{text.split(',')[0]}, x]\n")])
    assert c.run.output_dir == text
    assert c.model.freeze == (text.split(",")[0], "x")
    again = load(["--config", write_yaml(to_yaml(c, everything=True), "again.yaml")])
    assert again.run.output_dir == text and again.model.freeze == c.model.freeze


@pytest.mark.parametrize(
    "text, value",
    [("064", 64), ("1_000", 1000), ("1e2", 100), ("0x1F", None), ("12:30:45", None), ("no", None)],
)
def test_a_number_is_what_it_is_on_the_command_line(write_yaml, text, value):
    """Octal and base 60 of YAML 1.1 would make other numbers of them, in silence."""
    for argv in (["--config", write_yaml(f"batch_size: {text}\n")], ["--batch-size", text]):
        if value is None:
            with pytest.raises(UserError, match=f"--batch-size: expected int.auto, got '{text}'"):
                load(argv)
        else:
            assert load(argv).data.batch_size == value


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_nothing_is_no_text(write_yaml, text):
    assert load(["--config", write_yaml(f"clip_grad: {text}\naa: {text}\n")]).augment.aa is None
    with pytest.raises(UserError, match="line 2: --data-path: expected str.*quote a name: 'null'"):
        load(["--config", write_yaml(f"lr: 1\ndata_path: {text}\n")])
    assert load(["--config", write_yaml("data_path: 'null'\n")]).data.data_path == "null"


@pytest.mark.parametrize(
    "text, advice",
    [
        ("lr: 1\nfreeze: *", r"line 2.*; quote what begins with \*: freeze: '\*'"),
        ("freeze: *.bias", r"; quote what begins with \*: freeze: '\*\.bias'"),
        ("freeze: *head", r"undefined alias.*; quote what begins with \*: freeze: '\*head'"),
        ("freeze: [*, head]", r"; quote what begins with \*: '\*'"),
        ("freeze:\n- '*'\n- *x", r"line 3.*; quote what begins with \*: '\*'"),
        ("plugin: @mine", "; quote what begins with @: plugin: '@mine'"),
        ("model: !mine", "; quote what begins with !: model: '!mine'"),
        ("lr: 1\n\tseed: 2", "line 2.*; indent with spaces"),
        ("data_path: a: b", "; quote a value that has a colon in it"),
    ],
)
def test_what_yaml_refuses_comes_with_the_fix(write_yaml, text, advice):
    with pytest.raises(OptionError, match=advice) as caught:
        load(["--config", write_yaml(text)])
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "c.yaml").write_bytes("lr: 0.5\n".encode("utf-8-sig"))
    assert load(["--config", str(tmp_path / "c.yaml")]).optim.lr == 0.5
    (tmp_path / "c.yaml").write_bytes("lr: 0.5\n".encode("utf-16"))
    with pytest.raises(OptionError, match="c.yaml isn't text in UTF-8"):
        load(["--config", str(tmp_path / "c.yaml")])
