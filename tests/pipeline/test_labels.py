"""Several labels per image: CSV in its forms, shards, Hugging Face, and the split held out.

Also of pipeline/sources/shard_labels.py and pipeline/sources/stratified.py.
"""

import csv
import io
import json
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import assert_same, expected, load, noise, open_set, save

from errors import DataError, OptionError
from pipeline.dataset import summarise_classes
from pipeline.sources.hugging_face import HuggingFaceSource
from pipeline.sources.stratified import iterative_split
from samplers import EvalSampler

LABELS = (["cat", "dog"], [], ["dog"], ["cat"], ["bird", "cat", "dog"], ["dog"])
CLASSES = ["bird", "cat", "dog"]
TARGETS = [[0, 1, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(len(LABELS)):
        save(tmp_path / f"{number}.png", seed=number)
    return tmp_path


def table(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def of_cells(folder: Path, cells: list[str], column: str = "labels") -> Path:
    rows = [[f"{i}.png", cell] for i, cell in enumerate(cells)]
    return table(folder / "list.csv", ["image", column], rows)


def opened(path: Path, is_train: bool = True, **options):
    options = {"task": "multilabel", "val_fraction": 0.3, "split_column": "none", **options}
    return open_set("CSV", path, is_train, **options)


def whole(path: Path, **options):
    """All images of a file, in its order."""
    return opened(path, **options).source.source


@pytest.mark.parametrize(
    "write, options",
    [
        ("|".join, {}),
        (", ".join, {}),
        (" ".join, {"label_separator": "space"}),
        (json.dumps, {}),
        (repr, {}),
        ("/".join, {"label_separator": "/"}),
        (lambda labels: "|".join([*labels, *labels]), {}),
    ],
)
def test_a_column_of_labels(folder, write, options):
    source = whole(of_cells(folder, [write(labels) for labels in LABELS]), **options)
    assert source.classes == CLASSES
    assert source.targets.dtype == np.uint8 and source.targets.tolist() == TARGETS


def test_words_are_labels_where_they_come_together_in_many_ways(folder):
    cells = [" ".join(labels) for labels in LABELS]
    source = whole(of_cells(folder, [*cells[:-1], "bird dog"], "tags"))
    assert source.classes == CLASSES and source.targets[5].tolist() == [1, 0, 1]


def test_separators_that_are_not_clear_are_asked_for(folder):
    names = ["Golden Retriever", "Maine Coon", "", "Golden Retriever", "Maine Coon", "Poodle"]
    path = of_cells(folder, names)
    with pytest.raises(OptionError, match="--label-separator: .* add --label-separator space, or"):
        opened(path)
    assert whole(path, label_separator="none").classes == sorted(set(names) - {""})
    with pytest.raises(OptionError, match="has '\\|' and ','"):
        opened(of_cells(folder, ["a|b", "c,d", "a", "a", "a", "a"]))
    with pytest.raises(DataError, match=r"line 3: 'b' is no list of labels"):
        opened(of_cells(folder, ['["a"]', "b", "", "", "", ""]), label_separator="json")


@pytest.mark.parametrize("yes, no", [("1", "0"), ("1.0", ""), ("True", "False")])
def test_a_column_for_each_class(folder, yes, no):
    names = ["dog", "bird", "cat"]
    rows = [[f"{i}.png", *(yes if n in has else no for n in names)] for i, has in enumerate(LABELS)]
    source = whole(table(folder / "list.csv", ["image", *names], rows))
    assert source.classes == names
    assert source.targets[:, [1, 2, 0]].tolist() == TARGETS
    some = whole(folder / "list.csv", label_columns=("d*", "cat"))
    assert some.classes == ["dog", "cat"] and some.targets.tolist() == [
        [row[2], row[1]] for row in TARGETS
    ]


def test_columns_that_hold_more_are_named(folder):
    rows = [[f"{i}.png", str(30 + i), "1", "0"] for i in range(6)]
    path = table(folder / "list.csv", ["image", "age", "a", "b"], rows)
    with pytest.raises(OptionError, match="--label-columns: .* and age hold more than 0 and 1"):
        opened(path)
    with pytest.raises(OptionError, match="has no column c"):
        opened(path, label_columns=("c",))
    with pytest.raises(DataError, match="line 2: age is '30', not 0 or 1"):
        opened(path, label_columns=("age", "a"))


def test_a_validation_file_has_the_classes_of_training(folder):
    of_cells(folder, ["a|b", "b", "", "a", "c", "a"]).rename(folder / "train.csv")
    of_cells(folder, ["b|a", ""]).rename(folder / "val.csv")
    val = opened(folder, False, val_fraction=None, split_column="")
    assert val.classes == ["a", "b", "c"] and val.targets.tolist() == [[1, 1, 0], [0, 0, 0]]
    of_cells(folder, ["b|z"]).rename(folder / "val.csv")
    with pytest.raises(DataError, match=r"val.csv, line 2: no class 'z' in the training part"):
        opened(folder, False, val_fraction=None, split_column="")
    for name, columns in (("train", ["a", "b"]), ("val", ["a"])):
        rows = [[f"{i}.png", *["1"] * len(columns)] for i in range(3)]
        table(folder / f"{name}.csv", ["image", *columns], rows)
    with pytest.raises(DataError, match="val.csv has no column of 1 classes: b"):
        opened(folder, False, val_fraction=None, split_column="")


def test_batches_have_vectors_of_labels(folder):
    data = opened(of_cells(folder, ["|".join(labels) for labels in LABELS]))
    for workers in (0, 2):
        batches = load(data, EvalSampler(len(data)), workers)
        targets = torch.cat([batch.targets for batch in batches])
        assert targets.dtype == torch.float32
        assert targets.tolist() == data.targets.tolist()
    assert_same(batches, load(data, EvalSampler(len(data))))


def test_the_task_and_the_labels_of_a_set_agree(folder):
    with pytest.raises(OptionError, match="--task: DIGITS gives each image one label"):
        open_set("DIGITS", "", task="multilabel")


def test_the_summary_counts_labels(folder):
    data = opened(of_cells(folder, ["|".join(labels) for labels in LABELS])).with_source(
        whole(folder / "list.csv")
    )
    counts, lines = summarise_classes(data)
    assert counts.tolist() == [1, 3, 4]
    assert lines == [
        "labels per image: 1.33 on average, 3 at most; 1 images have none",
        "images per class: bird 1, cat 3, dog 4",
    ]


# --- shards and Hugging Face ----------------------------------------------------------------------


def shard(path: Path, form: str) -> None:
    with tarfile.open(path, "w") as tar:
        for number, labels in enumerate(LABELS):
            buffer = io.BytesIO()
            Image.fromarray(noise(number)).save(buffer, "PNG")
            numbers = [CLASSES.index(label) for label in labels]
            label = {
                "names": ("json", json.dumps({"labels": labels})),
                "list": ("json", json.dumps(numbers)),
                "numbers": ("cls", " ".join(map(str, numbers))),
            }[form]
            for end, content in (("png", buffer.getvalue()), (label[0], label[1].encode())):
                info = tarfile.TarInfo(f"s{number}.{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form, known", [("names", False), ("list", True), ("numbers", False)])
def test_shards(tmp_path, form, known):
    for part in ("train", "val"):
        shard(tmp_path / f"{part}.tar", form)
    if known:
        (tmp_path / "_info.json").write_text(
            json.dumps({"classes": CLASSES, "splits": {"train": {"filenames": ["train.tar"]}}})
        )
    data = open_set("wds/x", tmp_path, task="multilabel")
    assert data.classes == (["0", "1", "2"] if form == "numbers" else CLASSES)
    assert data.targets.tolist() == TARGETS
    assert torch.equal(data[4].image, expected(4)) and data[4].target.tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="label"):
        open_set("wds/x", tmp_path)


@pytest.mark.parametrize("named", [True, False])
def test_hugging_face_sequences(monkeypatch, named):
    """Class labels come as numbers with names, others as they are."""
    rows = [[CLASSES.index(label) for label in labels] if named else labels for labels in LABELS]
    kind = types.SimpleNamespace(names=CLASSES) if named else object()

    class Rows:
        features = {"image": object(), "labels": types.SimpleNamespace(feature=kind)}

        def __getitem__(self, name):
            return {"labels": rows}[name]

    reader = types.SimpleNamespace(dataset=Rows(), label_key="label")
    monkeypatch.setattr(
        HuggingFaceSource, "_open_reader", lambda self: setattr(self, "reader", reader)
    )
    source = HuggingFaceSource("some/Set", None, "train", multilabel=True)
    assert source.classes == CLASSES and source.targets.tolist() == TARGETS
    assert reader.label_key == "labels"
    Rows.features["labels"] = object()
    with pytest.raises(DataError, match="no sequence of labels"):
        HuggingFaceSource("some/Set", None, "train", multilabel=True)


# --- held out -------------------------------------------------------------------------------------


def test_each_label_has_its_share_on_both_sides():
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 6)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.01]).astype(np.uint8)
    targets[:, 5] = 0
    targets[7, 5] = 1
    train, val = iterative_split(targets, 0.2, seed=3)
    assert np.array_equal(np.sort(np.r_[train, val]), np.arange(400)) and len(val) == 80
    for k in range(5):
        wanted = 0.2 * targets[:, k].sum()
        assert abs(int(targets[val, k].sum()) - wanted) <= 1
    assert 7 in train
    none = targets.sum(1) == 0
    assert abs(int(none[val].sum()) - 0.2 * none.sum()) <= 4
    assert np.array_equal(val, iterative_split(targets, 0.2, seed=3)[1])
    assert not np.array_equal(val, iterative_split(targets, 0.2, seed=4)[1])
