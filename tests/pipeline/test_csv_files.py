"""pipeline/sources/csv_files.py: files that list image paths and labels."""

import csv

import numpy as np
import pytest
import torch
from tiny_sets import expected, open_set, save

from errors import DataError, OptionError


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
