"""Config files: what is read from YAML, what is wrong with it, and what is written."""

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
    ("warmup_epocs: 3", "unknown option 'warmup_epocs'; did you mean --warmup-epochs"),
    ("qqqq: 3", "unknown option 'qqqq'; --help"),
    ("lr: fast", "--lr: expected float, got 'fast'"),
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


def test_base_files_may_not_go_in_circles(write_yaml):
    path = write_yaml("base: b.yaml", "a.yaml")
    write_yaml("base: a.yaml", "b.yaml")
    with pytest.raises(OptionError, match="leads back to itself"):
        read_yaml(Path(path))


def test_unreadable_files(tmp_path):
    with pytest.raises(OptionError, match=r"--config: .*does not exist"):
        load(["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(OptionError, match="can't be read"):
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
