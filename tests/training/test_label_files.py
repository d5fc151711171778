"""The files of --class-map, --valid-labels and --real-labels, against timm's readers."""

import json
import os
from pathlib import Path

import pytest
import timm.data
from timm.data import RealLabelsImagenet
from timm.data.readers.class_map import load_class_map

from errors import OptionError
from training.label_files import read_class_map, read_real_labels, read_valid_labels
from training.label_space import ModelClasses

NAMES = ["tench", "goldfish", "great white shark", "hen"]


def find(word: str) -> int:
    """A class of a model of four, by index or name."""
    index = int(word) if word.lstrip("-").isdigit() else NAMES.index(word)
    if not 0 <= index < 4:
        raise ValueError(f"no class {word}")
    return index


def written(tmp_path, text, name="file.txt"):
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return str(tmp_path / name)


# --- class maps -----------------------------------------------------------------------------------


def test_a_list_of_names_is_timms_class_map(tmp_path):
    file = written(tmp_path, "b\na\ngreat white shark\nclass d\n")
    assert read_class_map(file, find) == load_class_map(file)


@pytest.mark.parametrize(
    "name, content",
    [
        ("map.txt", "b 3\na\t0\n  great white  2  \n\n"),
        ("map.json", {"b": 3, "a": 0, "great white": 2}),
        ("map.json", {"b": "hen", "a": "tench", "great white": "great white shark"}),
        ("map.txt", "\ufeffb 3\r\na 0\r\ngreat white 2\r\n"),
    ],
)
def test_names_and_indices(tmp_path, name, content):
    found = read_class_map(written(tmp_path, content, name), find)
    assert found == {"b": 3, "a": 0, "great white": 2}


def test_json_may_be_a_list_of_names_and_two_names_one_class(tmp_path):
    assert read_class_map(written(tmp_path, ["b", "a"], "l.json"), find) == {"b": 0, "a": 1}
    assert read_class_map(written(tmp_path, "b 3\na 3"), find) == {"b": 3, "a": 3}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.txt", "a 0\nb\nc 2", "m.txt, line 2: 'b' has no index and other lines have one"),
        ("m.txt", "a 0\nb 4", "m.txt, line 2: no class 4"),
        ("m.txt", "a 0\nb -1", "m.txt, line 2: no class -1"),
        ("m.txt", "a 0\nb 1\na 2", "m.txt, line 3: 'a' is there already: remove one"),
        ("m.txt", "a\n\nb", "m.txt, line 2 is empty: remove it"),
        ("m.txt", " \n", "m.txt is empty: write a class on each line"),
        ("m.json", '{"a": 0,\n"b" 1}', "m.json, line 2: not JSON"),
        ("m.json", '{"a": 0, "a": 1}', "m.json, entry 2: 'a' is there already: remove one"),
        ("m.json", {"a": 0, "b": 1.5}, "m.json, entry 2: 'b': 1.5 isn't a name and an index"),
        ("m.json", {"a": True}, "m.json, entry 1: 'a': True isn't a name and an index"),
        ("m.json", {"a": {"b": 1}}, "entry 1: 'a': "),
        ("m.json", [["a", 1]], "entry 1: ['a', 1]: 0 isn't a name and an index"),
        ("m.json", {"a": 9}, "m.json, entry 1: no class 9"),
        ("m.json", "7", "m.json holds neither"),
        ("m.json", [], "m.json holds neither"),
    ],
)
def test_bad_class_maps_are_named_with_their_line(tmp_path, name, content, message):
    with pytest.raises(OptionError) as caught:
        read_class_map(written(tmp_path, content, name), find)
    assert str(caught.value).startswith("--class-map: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_or_no_text(tmp_path):
    (tmp_path / "map.pkl").write_bytes(b"\x80\x04\x95\xff")
    for file, message in (
        (str(tmp_path / "none.txt"), "does not exist: name the file"),
        (str(tmp_path), "this is a folder: name a file"),
        (str(tmp_path / "map.pkl"), "isn't text: give a .txt or .json file"),
    ):
        with pytest.raises(OptionError) as caught:
            read_class_map(file, find)
        assert file in str(caught.value) and message in str(caught.value)


# --- valid labels ---------------------------------------------------------------------------------


def test_valid_labels_keep_the_order_of_the_file(tmp_path):
    assert read_valid_labels(written(tmp_path, "3\n0\n1\n"), find) == [3, 0, 1]
    assert read_valid_labels(written(tmp_path, "hen\n 1 \ntench"), find) == [3, 1, 0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("0\n4", "line 2: no class 4"),
        ("0\n1\nhen\n3", "line 4: '3' is the class of line 3: remove one"),
        ("0\n\n1", "line 2 is empty"),
        ("", "is empty"),
    ],
)
def test_bad_valid_labels_are_named_with_their_line(tmp_path, content, message):
    with pytest.raises(OptionError) as caught:
        read_valid_labels(written(tmp_path, content), find)
    assert str(caught.value).startswith("--valid-labels: ") and message in str(caught.value)


# --- real labels ----------------------------------------------------------------------------------


def test_real_labels_are_timms(tmp_path):
    entries = [[1, 0], [], [3]]
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]
    file = written(tmp_path, entries, "real.json")
    theirs = RealLabelsImagenet(names, real_json=file).real_labels
    found = read_real_labels(file, 4)
    assert {name: found[i] for i, name in enumerate(names)} == theirs


def test_the_files_of_the_variants_are_read():
    """As timm brings them: ImageNet-ReaL's labels, of which 46 837 images have some, and the
    classes of ImageNet-A and -R by index and by WordNet id."""
    info = Path(timm.data.__file__).parent / "_info"
    real = read_real_labels(str(info / "imagenet_real_labels.json"), 1000)
    assert (len(real), sum(map(bool, real))) == (50_000, 46_837)
    model = ModelClasses.of("resume", "w.pth", 1000)
    for variant in "ar":
        indices, ids = (
            read_valid_labels(str(info / f"imagenet_{variant}_{kind}.txt"), model.find)
            for kind in ("indices", "synsets")
        )
        assert indices == ids and len(ids) == 200


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": [0]}, "isn't a list of lists of class indices"),
        ([], "isn't a list of lists"),
        ([[0], 3], "entry 2: 3 isn't a list of class indices"),
        ([[0], [1], ["1"]], "entry 3: ['1'] isn't a list of class indices"),
        ([[True]], "entry 1: [True] isn't a list of class indices"),
        ([[0], [2, 4]], "entry 2: 4 is no class of the model, which has 0 to 3"),
        ([[-1]], "entry 1: -1 is no class of the model"),
        ("[[0],\n[1]", "line 2: not JSON"),
    ],
)
def test_bad_real_labels_are_named_with_their_entry(tmp_path, content, message):
    file = written(tmp_path, content, "real.json")
    with pytest.raises(OptionError) as caught:
        read_real_labels(file, 4)
    assert str(caught.value).startswith(f"--real-labels: {file}") and message in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[[1" + "0" * 5000 + "]]"])
def test_json_that_no_reader_takes_is_named(tmp_path, text):
    with pytest.raises(OptionError, match=r"--real-labels: .*not JSON that can be read"):
        read_real_labels(written(tmp_path, text, "real.json"), 4)
    with pytest.raises(OptionError, match=r"--class-map: .*not JSON that can be read"):
        read_class_map(written(tmp_path, text, "map.json"), find)


def test_messages_of_long_values_are_short(tmp_path):
    with pytest.raises(OptionError) as caught:
        read_real_labels(written(tmp_path, [[["x" * 10**5] * 9] * 9], "real.json"), 4)
    assert len(str(caught.value)) < 600
    with pytest.raises(OptionError) as caught:
        read_class_map(written(tmp_path, f"a {'9' * 17}\n"), find)
    assert len(str(caught.value)) < 600
    # A line is looked at once, not with the square of its length.
    spaces = written(tmp_path, f"tench 0\na{' ' * 10**6}b\n")
    with pytest.raises(OptionError, match="line 2: .* has no index") as caught:
        read_class_map(spaces, find)
    assert len(str(caught.value)) < 600


def test_a_file_of_labels_is_a_regular_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "long", "wb") as file:
        file.truncate(1 << 40)
    for name, message in (("pipe", "a named pipe"), ("long", "no more than 64 MiB is read")):
        with pytest.raises(OptionError, match=message):
            read_valid_labels(str(tmp_path / name), find)
