"""tools.data split: what it deals out."""

import collections
import csv
import shutil
from pathlib import Path

import numpy as np
from data_parts import CLASSES, open_part, save

from tools.data.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def rows(path: Path) -> dict[str, str]:
    """Class name by path of a list."""
    with open(path, encoding="utf-8", newline="") as file:
        return {str(path.parent / row["path"]): row["label"] for row in csv.DictReader(file)}


def split(source: Path, folder: Path, *more: str) -> list[dict[str, str]]:
    assert main(["split", str(source), "--output-dir", str(folder), *more]) == 0
    return [
        rows(folder / f"{n}.csv")
        for n in ("train", "val", "test")
        if (folder / f"{n}.csv").exists()
    ]


def test_split_is_stratified_seeded_and_complete(pets, tmp_path):
    parts = split(pets / "train", tmp_path / "a", "--val", "0.2", "--test", "0.3")
    assert [len(part) for part in parts] == [15, 6, 9]
    for part, count in zip(parts, (5, 2, 3), strict=True):
        assert collections.Counter(part.values()) == dict.fromkeys(CLASSES, count)
    together = parts[0] | parts[1] | parts[2]
    assert together == {str(p): p.parent.name for p in pets.glob("train/*/*.jpg")}
    assert split(pets / "train", tmp_path / "b", "--val", "0.2", "--test", "0.3") == parts
    other = split(pets / "train", tmp_path / "c", "--val", "0.2", "--test", "0.3", "--seed", "1")
    assert other != parts
    # From a list the same comes out as from the folder.
    lines = [f"{path},{name}" for path, name in together.items()]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *lines]))
    again = split(tmp_path / "all.csv", tmp_path / "d", "--val", "0.2", "--test", "0.3")
    assert again == parts


def test_split_is_read_by_training(pets, tmp_path):
    train, val = split(pets / "train", tmp_path)
    for is_train, part in ((True, train), (False, val)):
        dataset = open_part("CSV", tmp_path, is_train)
        assert dataset.classes == list(CLASSES) and len(dataset) == len(part)
        assert not dataset.source.sample_id(0).startswith(str(tmp_path))


def test_split_writes_relative_paths_where_it_lies_above_the_images(pets, tmp_path):
    root = shutil.copytree(pets / "train", tmp_path / "images")
    split(root, tmp_path)
    tmp_path = tmp_path.rename(tmp_path.with_name("moved"))
    assert len(open_part("CSV", tmp_path)) == 27
    assert (tmp_path / "train.csv").read_text().splitlines()[1].startswith("images/ant/")
    assert Path(open_part("CSV", tmp_path).sample_id(0)).exists()


def test_split_refuses(pets, tmp_path, capsys):
    def fails(*argv: str) -> str:
        assert main(["split", *argv]) == 2
        return capsys.readouterr().err

    assert "validation part already" in fails(str(pets), "--output-dir", str(tmp_path))
    assert "does not exist" in fails(str(tmp_path / "no"), "--output-dir", str(tmp_path))
    source = str(pets / "train")
    assert "--val above 0" in fails(source, "--output-dir", str(tmp_path), "--val", "0")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "val.csv").write_text("mine")
    assert "there already" in fails(source, "--output-dir", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["val.csv"]


def test_split_says_which_part_lacks_a_class(tmp_path, capsys):
    for name, count in (("many", 9), ("one", 1)):
        for i in range(count):
            save(tmp_path / "p" / name / f"{i}.png", np.full((4, 4), i))
    train, val = split(tmp_path / "p", tmp_path / "s")
    assert list(val.values()) == ["many"] and "one" in train.values()
    assert "warning: val has no image of 1 classes" in capsys.readouterr().out
