"""pipeline/sources/csv_files.py: files that list image paths and labels.

Also of pipeline/sources/tables.py.
"""

import csv
import os
import pickle

import numpy as np
import pytest
import torch
from tiny_sets import expected, open_set, save

from config import DataOptions
from errors import DataError, OptionError
from pipeline.dataset import build_dataset, findings
from pipeline.sources import tables


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("delimiter", list(",;\t|"))
@pytest.mark.parametrize("header", [None, ["path", "label"], ["Image", "Class"]])
def test_csv_folder(tmp_path, delimiter, header):
    names = [save(tmp_path / "pics" / f"p {i}.png", seed=i).relative_to(tmp_path) for i in range(4)]
    head = [header] if header else []
    rows = list(zip(names, ["pear", "fig", "pear", "apple"], strict=True))
    write_csv(tmp_path / "train.csv", head + rows, delimiter)
    write_csv(tmp_path / "val.csv", head + rows[:2], delimiter)
    train, val = (open_set("CSV", tmp_path, t) for t in (True, False))
    assert train.classes == val.classes == ["apple", "fig", "pear"]
    assert train.targets.tolist() == [2, 1, 2, 0] and val.targets.tolist() == [2, 1]
    assert torch.equal(train[3].image, expected(3))


def test_csv_columns_in_any_order_and_numeric_classes(tmp_path):
    names = [save(tmp_path / f"{i}.png").name for i in range(12)]
    rows = [(f"id{i}", str(i), names[i]) for i in range(12)]
    write_csv(tmp_path / "all.csv", [("id", "target", "filename"), *rows])
    train = open_set("CSV", tmp_path / "all.csv", val_fraction=0.5)
    assert train.classes == [str(i) for i in range(12)]
    assert train.targets.tolist() == list(range(12))
    # Names of more digits than Python makes numbers of are in the order of letters.
    longest = "9" * 5000
    write_csv(tmp_path / "all.csv", [(n, ("10", "9", longest)[i % 3]) for i, n in enumerate(names)])
    found = open_set("CSV", tmp_path / "all.csv", val_fraction=0.5)
    assert found.classes == ["10", "9", longest]
    # Two names of one number stay in one order.
    write_csv(
        tmp_path / "all.csv", [(name, ("1", "01", "001")[i % 3]) for i, name in enumerate(names)]
    )
    assert open_set("CSV", tmp_path / "all.csv", val_fraction=0.5).classes == ["001", "01", "1"]


def test_csv_file_is_split_by_class_and_seed(tmp_path):
    names = [save(tmp_path / f"{i}.png").name for i in range(20)]
    write_csv(tmp_path / "all.csv", [(n, "ab"[i % 2]) for i, n in enumerate(names)])
    train, val = (
        open_set("CSV", tmp_path / "all.csv", t, val_fraction=0.2, seed=4) for t in (True, False)
    )
    assert np.bincount(train.targets).tolist() == [8, 8]
    assert np.bincount(val.targets).tolist() == [2, 2]
    ids = {d.sample_id(i) for d in (train, val) for i in range(len(d))}
    assert len(ids) == 20
    other = open_set("CSV", tmp_path / "all.csv", False, val_fraction=0.2, seed=5)
    assert not np.array_equal(other.source.indices, val.source.indices)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,label\nx.png,a\n\nx.png\n", "line 4: 1 columns instead of 2"),
        ("path,label\nx.png,\n", "line 2: no label"),
        ("path,label\n ,a\n", "line 2: no path"),
        ("path,note\nx.png,a\n", "line 1: no column named label"),
        ("photo,kind\nx.png,a\n", "line 1: neither a header"),
        ("x.png\n", "line 1: expected two columns"),
        ("", "line 1: expected two columns"),
        ("path,label\n", "has no images"),
    ],
)
def test_csv_mistakes_name_the_line(tmp_path, text, match):
    save(tmp_path / "x.png")
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=rf"train\.csv.*{match}"):
        open_set("CSV", tmp_path, val_fraction=0.5)


def test_more_csv_mistakes(tmp_path):
    save(tmp_path / "x.png")
    with pytest.raises(OptionError, match=r"--data-path: .*train\.csv does not exist"):
        open_set("CSV", tmp_path)
    (tmp_path / "train.csv").write_text("x.png,a\nx.png,b\n")
    with pytest.raises(OptionError, match="--val-fraction: .*val.csv"):
        open_set("CSV", tmp_path)
    (tmp_path / "val.csv").write_text("path,label\nx.png,a\nx.png,c\n")
    with pytest.raises(DataError, match=r"val\.csv, line 3: no class 'c'"):
        open_set("CSV", tmp_path, False)
    with pytest.raises(OptionError, match="--val-fraction"):
        open_set("CSV", tmp_path, val_fraction=0.5)


IDS = [f"{i:03d}" for i in range(6)]


def listed(path, header, column=IDS, labels="ababab", **more):
    """A list of six images, with further columns."""
    rows = zip(column, labels, *more.values(), strict=True)
    write_csv(path, [(*header.split(","), *more), *rows])
    return path


@pytest.fixture
def kaggle(tmp_path):
    """images/000.png …, as Kaggle has them beside its lists."""
    for i, name in enumerate(IDS):
        save(tmp_path / "images" / f"{name}.png", seed=i)
    return tmp_path


@pytest.mark.parametrize(
    "header", ["id,breed", "image_id,label", "Image,Id", "filename,category", "id_code,diagnosis"]
)
def test_ids_of_kaggle_below_an_image_root(kaggle, header):
    table = listed(kaggle / "train.csv", header)
    options = {"val_fraction": 0.4, "image_root": str(kaggle / "images")}
    train, val = (open_set("CSV", table, t, **options) for t in (True, False))
    assert train.classes == ["a", "b"] and (len(train), len(val)) == (4, 2)
    assert val.sample_id(0) == str(kaggle / "images" / f"{IDS[val.source.indices[0]]}.png")
    assert torch.equal(val[0].image, expected(int(val.source.indices[0])))
    # A test set without labels beside it is no validation part.
    (kaggle / "test.csv").write_text("id\n7\n")
    with pytest.raises(OptionError, match=r"test\.csv has no labels.*add --val-fraction 0\.1"):
        open_set("CSV", kaggle, image_root=options["image_root"])
    assert findings(open_set("CSV", kaggle, **options)) == [
        f"{kaggle}/test.csv has no labels (Kaggle's test set?): it isn't used"
    ]


def test_a_list_without_labels_cannot_be_evaluated(kaggle):
    write_csv(kaggle / "test.csv", [("image_id", "size"), ("000", "3")])
    for path, match in ((kaggle / "test.csv", "no column named label"), (kaggle, "has no labels")):
        data = DataOptions(data_set="CSV", data_path=str(path))
        with pytest.raises((DataError, OptionError), match=rf"{match}.*tools\.predict"):
            build_dataset(False, data, seed=0, classes=["a"])


def test_missing_files_are_named_together_with_what_helps(kaggle):
    table = listed(kaggle / "train.csv", "id,label")
    with pytest.raises(DataError, match=rf"6 of 6 .* 000 \(line 2\), .*--image-root {kaggle}/im"):
        open_set("CSV", table, val_fraction=0.4)
    for name in IDS[2:]:
        (kaggle / "images" / f"{name}.png").unlink()
    options = {"val_fraction": 0.4, "image_root": str(kaggle / "images")}
    with pytest.raises(DataError, match=r"4 of 6 .* 002 .*005 \(line 7\): .*--on-bad-image skip"):
        open_set("CSV", table, **options)
    train = open_set("CSV", table, on_bad_image="skip", **options)
    assert len(train) == 4 and "4 of 6 images are missing" in findings(train)[0]
    bad = {line for i in range(4) for line in train[i].bad}
    assert any(line.startswith(f"{kaggle}/images/00") and "No such file" in line for line in bad)
    table = listed(kaggle / "jpg.csv", "path,label", [f"images/{name}.jpg" for name in IDS])
    with pytest.raises(DataError, match=r"there is images/000\.png: correct the extensions"):
        open_set("CSV", table, val_fraction=0.4)
    table = listed(kaggle / "far.csv", "path,label", [f"C:\\x\\{name}.png" for name in IDS])
    with pytest.raises(DataError, match="the paths of another machine"):
        open_set("CSV", table, on_bad_image="skip", val_fraction=0.4)


def test_what_a_list_may_mean_twice_is_refused(kaggle):
    table = listed(kaggle / "train.csv", "id,label")
    save(kaggle / "images" / "003.jpg")
    options = {"val_fraction": 0.4, "image_root": str(kaggle / "images")}
    with pytest.raises(DataError, match=r"1 names fit .*003 \(line 5: 003\.jpg, 003\.png\)"):
        open_set("CSV", table, **options)
    table = listed(
        kaggle / "two.csv", "path,label", [f"images/{n}.png" for n in IDS], kind="aabbab"
    )
    assert len(open_set("CSV", table, val_fraction=0.4)) == 4
    table = listed(table, "path,label", [f"images/{n}.png" for n in IDS], **{"class": "aabbab"})
    with pytest.raises(
        DataError, match=r"label and class; its columns are path, label, class: .*--la"
    ):
        open_set("CSV", table, val_fraction=0.4)
    chosen = open_set("CSV", table, val_fraction=0.4, label_column="Class")
    assert chosen.source.source.targets.tolist() == [0, 0, 1, 1, 0, 1]
    # Two columns of the same classes are no question.
    table = listed(table, "path,label", [f"images/{n}.png" for n in IDS], class_name="ststst")
    assert open_set("CSV", table, val_fraction=0.4).classes == ["a", "b"]
    with pytest.raises(OptionError, match="--label-column: .* 'clas_name'; did you mean class_n"):
        open_set("CSV", table, label_column="clas_name")


def test_paths_of_windows(kaggle):
    table = listed(kaggle / "l.csv", "path,label", [f"images\\{name}.png" for name in IDS])
    assert torch.equal(open_set("CSV", table, val_fraction=0.4)[0].image, expected(0))


@pytest.mark.parametrize(
    ("name", "values", "rows"),
    [
        ("split", ["train", "train", "val", "test", "train", "train"], [2]),
        ("Split", ["Train", "Train", "Test", "Test", "Train", "Train"], [2, 3]),
        ("data set", ["training", "training", "valid", "valid", "training", "training"], [2, 3]),
        ("is_valid", ["False", "False", "True", "TRUE", "False", "False"], [2, 3]),
        ("is_train", ["1", "1", "0", "0", "1", "1"], [2, 3]),
        ("subset", ["train", "train", "dev", "dev", "train", "train"], [2, 3]),
    ],
)
def test_a_column_of_parts_is_used(kaggle, name, values, rows):
    paths = [f"images/{n}.png" for n in IDS]
    table = listed(kaggle / "l.csv", "path,label", paths, **{name: values})
    train, val = (open_set("CSV", table, t) for t in (True, False))
    assert [val.sample_id(i) for i in range(len(val))] == [str(kaggle / paths[r]) for r in rows]
    assert [train.sample_id(i) for i in range(4)] == [str(kaggle / paths[r]) for r in (0, 1, 4, 5)]
    # --eval validates on the same rows.
    data = DataOptions(data_set="CSV", data_path=str(table))
    assert len(build_dataset(False, data, seed=0, classes=["a", "b"])) == len(rows)
    with pytest.raises(OptionError, match="--val-fraction: .*or add --split-column none"):
        open_set("CSV", table, val_fraction=0.5)
    assert len(open_set("CSV", table, split_column="none", val_fraction=0.4)) == 4


def test_columns_that_are_no_parts(kaggle):
    paths = [f"images/{n}.png" for n in IDS]
    for name in ("set", "part", "usage"):
        table = listed(kaggle / "l.csv", "path,label", paths, **{name: "xyzxyz"})
        assert len(open_set("CSV", table, val_fraction=0.4)) == 4
    table = listed(kaggle / "l.csv", "path,label", paths, fold="012012")
    with pytest.raises(DataError, match="fold has 3 numbers of folds: .*--split-column none"):
        open_set("CSV", table, val_fraction=0.4)
    # A column of parts beside it says what they are, and the labels are no parts.
    split = ["train"] * 4 + ["val"] * 2
    table = listed(kaggle / "l.csv", "path,label", paths, fold="012012", split=split)
    assert len(open_set("CSV", table)) == 4
    table = listed(kaggle / "l.csv", "path,train", paths, "101010")
    assert len(open_set("CSV", table, label_column="train", val_fraction=0.4)) == 4
    values = ["train", "train", "later", "train", "train", "val"]
    table = listed(kaggle / "l.csv", "path,label", paths, split=values)
    with pytest.raises(DataError, match="line 4: split is 'later', not train, val or test"):
        open_set("CSV", table)
    write_csv(kaggle / "val.csv", [("path", "label"), ("images/000.png", "a")])
    listed(kaggle / "train.csv", "path,label", paths, split=["train"] * 5 + ["val"])
    with pytest.raises(OptionError, match=r"val\.csv both name a validation part"):
        open_set("CSV", kaggle)


def test_images_that_are_listed_twice_are_told(kaggle):
    paths = [f"images/{name}.png" for name in (*IDS[:3], *IDS[:3])]
    table = listed(kaggle / "l.csv", "path,label", paths)
    assert findings(open_set("CSV", table, val_fraction=0.4)) == [
        f"{table}: 3 images are listed more than once, 3 of them under more than one class "
        "(images/000.png, images/001.png, …)"
    ]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a|b", "b|c", "a", "a"], "'a|b' in label is taken for the name of one class"),
        (["a; b", "b; a", "c", "c"], "'a; b' in label is taken for the name of one class"),
        (["fly, agaric", "cap, death", "cap, death", "x"], None),
        (["7", "12", "4", "9"], "label has another label for each image"),
    ],
)
def test_labels_that_are_no_classes_are_pointed_out(tmp_path, labels, said):
    names = [save(tmp_path / f"{i}.png").name for i in range(4)]
    for part in ("train", "val"):
        write_csv(tmp_path / f"{part}.csv", [("image", "label"), *zip(names, labels, strict=True)])
    found = findings(open_set("CSV", tmp_path))
    assert len(found) == (said is not None)
    assert all(said in text for text in found)
    write_csv(tmp_path / "all.csv", [("image", "label"), *zip(names, "abcd", strict=True)])
    with pytest.raises(DataError, match="part is empty; .* another label for each image.*--label"):
        open_set("CSV", tmp_path / "all.csv", False, val_fraction=0.25)


def test_a_table_of_ones_and_zeros_names_its_option(tmp_path):
    name = save(tmp_path / "0.png").name
    write_csv(tmp_path / "all.csv", [("image", "MEL", "NV"), (name, "1.0", "0.0")])
    with pytest.raises(DataError, match="MEL, NV hold 0 and 1: --task multilabel"):
        open_set("CSV", tmp_path / "all.csv", val_fraction=0.5)


def test_images_in_folders_below_the_root(kaggle):
    """HAM10000: two folders of images, one list of names."""
    for part, names in (("part_1", IDS[:3]), ("part_2", IDS[3:])):
        for name in names:
            (kaggle / part).mkdir(exist_ok=True)
            (kaggle / "images" / f"{name}.png").rename(kaggle / part / f"{name}.png")
    table = listed(kaggle / "l.csv", "image_id,dx")
    for options in ({}, {"image_root": str(kaggle / "part_1")}):
        with pytest.raises(DataError, match=rf"--image-root {kaggle}(;|$)"):
            open_set("CSV", table, val_fraction=0.4, **options)
    train = open_set("CSV", table, image_root=str(kaggle), val_fraction=0.4)
    assert train.sample_id(3) == str(kaggle / "part_2" / f"{IDS[train.source.indices[3]]}.png")
    with pytest.raises(OptionError, match="--image-root: .*/none is no folder"):
        open_set("CSV", table, image_root=str(kaggle / "none"))


HOSTILE = {
    "a long path": (
        f"path,label\n{'x' * 5000},a\n",
        "line 2: a path of 5,000 characters",
    ),
    "a long label": (f"path,label\na.png,{'x' * 1001}\n", "line 2: a label of 1,001 characters"),
    "a long cell": (f"path,label\n{'x' * 140_000},a\n", "line 2: field larger than field limit"),
    "a long line": (f"path,label\n{'x,' * 600_000}", "line 2: more than 1,048,576 characters"),
    "many columns": (f"path,label\n{',' * 1000}", "line 2: 1,001 columns, and no more than 1,000"),
    "an open quote": ('path,label\na.png,a\na.png,"b\na.png,c\n', "line 3: a quote begins there"),
    "an open quote at the end": ('path,label\na.png,"b', "line 2: a quote begins there"),
    "separators only": (",,\n,,", "has no images"),
    "one line of them": (",", "has no images"),
    "a NUL": ("path,label\na\0.png,a\n", "1 of 1 images are missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_refused_in_a_short_line(tmp_path, name):
    text, message = HOSTILE[name]
    save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        open_set("CSV", tmp_path / "list.csv", val_fraction=0.5)
    assert len(str(caught.value)) < 1500


def test_the_last_line_needs_no_end(tmp_path):
    names = [save(tmp_path / f"{i}.png").name for i in range(2)]
    for end in ("", "\n", "\r\n", "\r"):
        text = (end or "\n").join(["path,label", *(f'"{name}",a' for name in names)]) + end
        (tmp_path / "list.csv").write_bytes(text.encode())
        train = open_set("CSV", tmp_path / "list.csv", val_fraction=0.5)
        assert len(train.source.source) == 2


def test_what_quotes_and_line_ends_mean(tmp_path):
    names = [save(tmp_path / f"{i}.png").name for i in range(3)]
    labels = ('5" disk', '"5"" and 6""\r\nlong"', "disk")
    lines = ["path,label", *map(",".join, zip(names, labels, strict=True))]
    (tmp_path / "list.csv").write_bytes("\r\n".join(lines).encode())
    data = open_set("CSV", tmp_path / "list.csv", val_fraction=0.5)
    assert list(data.classes) == ['5" and 6"\nlong', '5" disk', "disk"]


def test_a_table_of_too_many_cells_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_CELLS", 100)
    save(tmp_path / "a.png")
    write_csv(tmp_path / "list.csv", [("path", "label"), *[("a.png", "x")] * 49])
    assert len(open_set("CSV", tmp_path / "list.csv", val_fraction=0.5)) == 25
    write_csv(tmp_path / "list.csv", [("path", "label"), *[("a.png", "x")] * 50])
    with pytest.raises(DataError, match="has more than 100 cells"):
        open_set("CSV", tmp_path / "list.csv", val_fraction=0.5)


def test_a_table_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(DataError, match="this is a named pipe"):
        open_set("CSV", tmp_path)
    (tmp_path / "train.csv").unlink()
    with open(tmp_path / "train.csv", "wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(DataError, match="2 GiB, and no more than 1 GiB is read"):
        open_set("CSV", tmp_path)


def test_long_names_take_no_room_of_others(tmp_path):
    names = [save(tmp_path / f"{i}.png", seed=i).name for i in range(4)]
    long = "x/" * 2000 + "y.png"
    write_csv(tmp_path / "list.csv", [("path", "label"), *[(n, "a") for n in (*names, long)]])
    data = open_set("CSV", tmp_path / "list.csv", val_fraction=0.5, on_bad_image="skip")
    source = data.source.source
    assert [source.identity(i) for i in range(5)] == [*names, long]
    again = pickle.loads(pickle.dumps(source))
    assert again.identity(4) == long and len(again.paths) == 5
    assert len(pickle.dumps(source.paths)) < 6000
