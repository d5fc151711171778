"""tools.data split: what it deals out.

Also of tools/data/folds.py and tools/data/groups.py.
"""

import collections
import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_parts import CLASSES, open_part, save
from sklearn.model_selection import StratifiedGroupKFold

from tools.data.__main__ import main
from tools.data.folds import deal_groups, deal_images, keep_classes

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


# --- folds and groups ---------------------------------------------------------------------------


def random_groups(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Groups and labels of some hundred images, and a number of folds."""
    rng = np.random.RandomState(seed)
    number, classes, folds = rng.randint(20, 80), rng.randint(2, 6), rng.randint(3, 7)
    groups = np.repeat(np.arange(number), rng.geometric(0.1, number))
    likely = rng.dirichlet(np.full(classes, 0.5), number)
    labels = np.array([rng.choice(classes, p=likely[group]) for group in groups])
    return groups, np.unique(labels, return_inverse=True)[1], folds


def unevenness(fold: np.ndarray, labels: np.ndarray, folds: int) -> float:
    """Standard deviation of the folds' shares of the classes."""
    counts = np.zeros((folds, labels.max() + 1))
    np.add.at(counts, (fold, labels), 1)
    return float(np.sqrt(((counts / counts.sum(0) - 1 / folds) ** 2).mean()))


def test_groups_are_dealt_out_as_evenly_as_scikit_learn_does():
    ours, theirs = [], []
    for seed in range(8):
        groups, labels, folds = random_groups(seed)
        fold = deal_groups(groups, labels, [1 / folds] * folds, seed=0)
        for group in np.unique(groups):
            assert len(set(fold[groups == group])) == 1
        other = np.empty(len(labels), dtype=int)
        split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
        for number, (_, held_out) in enumerate(split.split(labels, labels, groups)):
            other[held_out] = number
        ours.append(unevenness(fold, labels, folds))
        theirs.append(unevenness(other, labels, folds))
        assert (np.bincount(fold, minlength=folds) > 0).all()
        assert (deal_groups(groups, labels, [1 / folds] * folds, seed=0) == fold).all()
    assert np.mean(ours) <= np.mean(theirs)


def test_groups_are_dealt_out_by_the_shares_of_parts():
    groups, labels, _ = random_groups(3)
    part = deal_groups(groups, labels, [0.7, 0.2, 0.1], seed=0)
    assert np.bincount(part) / len(part) == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_images_without_groups_differ_by_one_at_most():
    labels = np.repeat([0, 1, 2], [31, 7, 3])
    fold = deal_images(labels, 4, seed=1)
    for label in range(3):
        counts = np.bincount(fold[labels == label], minlength=4)
        assert counts.max() - counts.min() <= 1
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= 1


def test_training_keeps_every_class():
    """Class 1 is in the groups 1 and 2, both held out: the smaller one goes over."""
    groups = np.array([0, 0, 1, 1, 1, 2, 2, 3])
    labels = np.array([0, 0, 1, 1, 0, 1, 0, 0])
    held_out, moved = keep_classes(np.isin(groups, (1, 2)), groups, labels)
    assert moved == 2 and groups[held_out].tolist() == [1, 1, 1]


def patients(root: Path) -> tuple[Path, dict[str, str]]:
    """A list of 36 images of 12 patients in two classes, and the patient of each path."""
    lines, patient = ["path,label,patient"], {}
    for number in range(36):
        name, who = f"{'ant' if number % 2 else 'bee'}/{number}.png", f"p{number // 3:02d}"
        save(root / name, np.full((4, 4), number))
        lines.append(f"{name},{name[:3]},{who}")
        patient[str(root / name)] = who
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv", patient


def test_folds_of_patients(tmp_path, capsys):
    source, patient = patients(tmp_path / "p")
    folder = tmp_path / "folds"
    more = ("--group-by", "patient", "--folds", "3", "--test", "0.25")
    assert main(["split", str(source), "--output-dir", str(folder), *more]) == 0
    out = capsys.readouterr().out
    test, validated = rows(folder / "test.csv"), collections.Counter()
    for number in (1, 2, 3):
        parts = [rows(folder / f"fold-{number}" / f"{name}.csv") for name in ("train", "val")]
        assert sum(map(len, parts)) + len(test) == 36
        owners = [{patient[path] for path in part} for part in (*parts, test)]
        assert not owners[0] & owners[1] and not (owners[0] | owners[1]) & owners[2]
        assert all(set(part.values()) == {"ant", "bee"} for part in parts)
        validated.update(parts[1].keys())
        assert len(open_part("CSV", folder / f"fold-{number}")) == len(parts[0])
    assert set(validated.values()) == {1} and not validated.keys() & test.keys()
    assert f"--data-path {folder}/fold-$k --output-dir {folder}-runs/fold-$k; done" in out
    assert f"then: python -m tools.summary {folder}-runs/fold-*" in out


def test_groups_by_folder_and_by_pattern_are_those_of_the_column(tmp_path):
    root = tmp_path / "by_folder"
    for number in range(24):
        name = "ant" if number % 2 else "bee"
        save(root / name / f"visit{number // 6}" / f"s{number // 4}_{number}.png", np.eye(4))
    for more in (("--group-by", "parent"), ("--group-pattern", r"s(\d+)_\d+\.png$")):
        folder = tmp_path / more[0]
        train, val = split(root, folder, "--val", "0.3", *more)
        assert len(train) + len(val) == 24

        def group(path: str, by_folder: bool = more[1] == "parent") -> str:
            return str(Path(path).parent) if by_folder else Path(path).name.partition("_")[0]

        assert not set(map(group, train)) & set(map(group, val))
        assert set(train.values()) == set(val.values()) == {"ant", "bee"}


def test_folds_keep_an_only_image_of_a_class_in_training(tmp_path, capsys):
    for name, count in (("many", 9), ("one", 1)):
        for i in range(count):
            save(tmp_path / "p" / name / f"{i}.png", np.full((4, 4), i))
    folder = tmp_path / "s"
    assert main(["split", str(tmp_path / "p"), "--output-dir", str(folder), "--folds", "5"]) == 0
    for number in range(1, 6):
        assert "one" in rows(folder / f"fold-{number}" / "train.csv").values()
    assert "warning: 1 images are in training in fold-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--group-by", "patent"), "--group-by: .*no column 'patent'; did you mean patient"),
        (("--group-by", "patient", "--folds", "13"), "12 groups are too few for 13 parts"),
        (("--folds", "3", "--val", "0.2"), "with --folds leave it out"),
        (("--group-pattern", "("), "--group-pattern: .* is no pattern"),
        (("--group-pattern", "a{99999999999}"), "--group-pattern: .* is no pattern"),
        (("--group-pattern", "9" * 10_001), "--group-pattern: more than 10,000 characters"),
        (("--group-pattern", "(" * 5000), "--group-pattern: .* is no pattern"),
        (("--group-pattern", "x(9*)"), "finds no group in .*every image needs one"),
        (("--group-by", "patient", "--group-pattern", "a"), "leave one out"),
    ],
)
def test_folds_and_groups_that_are_refused(tmp_path, capsys, more, message):
    source, _ = patients(tmp_path / "p")
    assert main(["split", str(source), "--output-dir", str(tmp_path / "s"), *more]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_an_image_of_two_groups_and_a_folder_of_none_are_refused(tmp_path, capsys):
    source, _ = patients(tmp_path / "p")
    more = ["--output-dir", str(tmp_path / "s"), "--group-by", "patient"]
    text = source.read_text()
    source.write_text(text + "\nbee/0.png,bee,p05\n")
    assert main(["split", str(source), *more]) == 2
    assert "is of 'p05' here, of 'p00' above" in capsys.readouterr().err
    source.write_text(text + "\nbee/2.png,bee,\n")
    assert main(["split", str(source), *more]) == 2
    assert "line 38: no 'patient'" in capsys.readouterr().err
    source.unlink()
    assert main(["split", str(tmp_path / "p"), *more]) == 2
    assert "--group-by: a folder has no columns: give parent" in capsys.readouterr().err
