"""pipeline/class_lists.py: parts whose classes differ, of every kind of set."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sets import noise, save

from config import DataOptions
from errors import DataError
from pipeline.dataset import build_parts, findings
from pipeline.sources import registry
from pipeline.sources.base import ArraySource, Source

NAMES = ["ant", "bee", "cat"]


def plugin(root: Path, train: list[int], val: list[int]) -> dict:
    def factory(is_train, data, seed):
        targets = train if is_train else val
        images = np.zeros((len(targets), 4, 4), np.uint8)
        return ArraySource(images, targets, NAMES, "arrays")

    return {"data_set": "plugged", "factory": factory}


def folders(root: Path, train: list[int], val: list[int]) -> dict:
    for part, labels in (("train", train), ("val", val)):
        for number, label in enumerate(labels):
            save(root / part / NAMES[label] / f"{number}.png")
    return {"data_set": "IMNET"}


def csv_files(root: Path, train: list[int], val: list[int]) -> dict:
    save(root / "0.png")
    for part, labels in (("train", train), ("val", val)):
        rows = "".join(f"0.png,{NAMES[label]}\n" for label in labels)
        (root / f"{part}.csv").write_text(f"path,label\n{rows}")
    return {"data_set": "CSV"}


def csv_column(root: Path, train: list[int], val: list[int]) -> dict:
    save(root / "0.png")
    rows = [f"0.png,{NAMES[label]},train\n" for label in train]
    rows += [f"0.png,{NAMES[label]},val\n" for label in val]
    (root / "all.csv").write_text("path,label,split\n" + "".join(rows))
    return {"data_set": "CSV", "data_path": str(root / "all.csv")}


def shards(root: Path, train: list[int], val: list[int]) -> dict:
    for part, labels in (("train", train), ("val", val)):
        with tarfile.open(root / f"{part}-0.tar", "w") as tar:
            for number, label in enumerate(labels):
                image = io.BytesIO()
                Image.fromarray(noise(0)).save(image, "PNG")
                for end, data in (("png", image.getvalue()), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{number}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (root / "_info.json").write_text(
        json.dumps(
            {
                "classes": NAMES,
                "splits": {p: {"filenames": [f"{p}-0.tar"]} for p in ("train", "val")},
            }
        )
    )
    return {"data_set": "wds/x"}


def inat(root: Path, train: list[int], val: list[int]) -> dict:
    (root / "categories.json").write_text(
        json.dumps([{"id": i, "name": name} for i, name in enumerate(NAMES)])
    )
    for part, labels in (("train", train), ("val", val)):
        content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(len(labels))],
            "annotations": [{"image_id": i, "category_id": c} for i, c in enumerate(labels)],
        }
        (root / f"{part}2018.json").write_text(json.dumps(content))
    return {"data_set": "INAT"}


KINDS = [plugin, folders, csv_files, csv_column, shards, inat]


def parts_of(kind, root: Path, train: list[int], val: list[int], monkeypatch):
    options = kind(root, train, val)
    factory = options.pop("factory", None)
    if factory:
        monkeypatch.setitem(registry.FACTORIES, "PLUGGED", factory)
    return build_parts(DataOptions(**{"data_path": str(root), **options}), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_training_lacks_is_refused(kind, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cat"):
        parts_of(kind, tmp_path, [0, 1, 1], [0, 1, 2], monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_validation_lacks_is_said(kind, tmp_path, monkeypatch):
    parts = parts_of(kind, tmp_path, [0, 1, 2], [0, 2], monkeypatch)
    [text] = [t for t in findings(*parts) if "images of" in t]
    assert text == "the validation part has no images of 1 classes: bee"
    assert len(parts[1].classes) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_of_the_same_classes(kind, tmp_path, monkeypatch):
    parts = parts_of(kind, tmp_path, [0, 1, 2], [2, 1, 0], monkeypatch)
    assert not [t for t in findings(*parts) if "images of" in t]


def test_a_part_that_is_held_out_lacks_classes_of_one_image(tmp_path):
    for number, name in enumerate(("ant", "ant", "bee")):
        save(tmp_path / name / f"{number}.png")
    data = DataOptions(data_path=str(tmp_path), val_fraction=0.5)
    assert findings(*build_parts(data, seed=0)) == [
        "the validation part has no images of 1 classes: bee"
    ]


class Numbered(Source):
    """Labels that are known with the images alone."""

    targets = None

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (NAMES, NAMES, ""),
        (["0", "1", "2"], ["0", "1"], ""),
        (NAMES, ["ant", "bees"], "no class 'bees' in the training part.*did you mean bee"),
        (NAMES, ["bee", "ant", "cat"], "class 0 is 'ant' in the training part and 'bee'"),
        (["0", "1"], ["0", "1", "2"], "no class '2' in the training part"),
    ],
)
@pytest.mark.parametrize("prefix", ["tfds", "hfds", "plugin"])
def test_lists_of_classes_are_compared_where_labels_are_not_known(
    prefix, train, val, message, monkeypatch
):
    def factory(is_train, *_):
        return Numbered(train if is_train else val)

    if prefix == "plugin":
        monkeypatch.setitem(registry.FACTORIES, "PLUGGED", factory)
        data = DataOptions(data_set="plugged")
    else:
        monkeypatch.setitem(registry.PREFIXES, prefix, lambda name: factory)
        data = DataOptions(data_set=f"{prefix}/x")
    if not message:
        assert len(build_parts(data, seed=0)) == 2
        return
    with pytest.raises(DataError, match=message):
        build_parts(data, seed=0)


def test_labels_of_the_validation_part_alone_are_named(tmp_path):
    for part, row in (("train", "1,0,0"), ("val", "1,0,1")):
        (tmp_path / f"{part}.csv").write_text(f"path,{','.join(NAMES)}\n0.png,{row}\n")
    save(tmp_path / "0.png")
    data = DataOptions(
        task="multilabel", data_set="CSV", data_path=str(tmp_path), label_columns=tuple(NAMES)
    )
    told = [text for text in findings(*build_parts(data, seed=0)) if "can't be learnt" in text]
    assert len(told) == 1 and "(cat)" in told[0]
