"""pipeline/sources/folders.py: one folder per class."""

import errno
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny_sets import expected, open_set, save

from config import DataOptions
from errors import DataError, OptionError
from pipeline.dataset import build_dataset, findings


@pytest.fixture
def folders(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", seed=10 * label + i)
    return tmp_path


def test_image_folder(folders, caplog):
    (folders / "train/ant/notes.txt").write_text("x")
    (folders / "train/.hidden").mkdir()
    save(folders / "train/ant/deep/er/9.JPEG", seed=99, format="JPEG")
    save(folders / "train/ant/.cache/8.png", seed=99)
    with caplog.at_level(logging.INFO):
        train, val = (open_set("imnet", folders, is_train) for is_train in (True, False))
    assert "1 files that are not images" in caplog.text
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.targets.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert val.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert val.sample_id(2) == str(folders / "val/bee/0.png")
    assert torch.equal(val[2].image, expected(10))
    assert pickle.loads(pickle.dumps(val)).sample_id(2) == val.sample_id(2)


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_the_validation_part(folders, name):
    (folders / "val").rename(folders / name)
    assert len(open_set("IMNET", folders, is_train=False)) == 6


def test_class_folders_with_a_held_out_share(folders):
    parts = [open_set("IMNET", folders / "train", t, val_fraction=0.25) for t in (True, False)]
    assert [np.bincount(p.targets).tolist() for p in parts] == [[3, 3, 3], [1, 1, 1]]
    ids = [{p.sample_id(i) for i in range(len(p))} for p in parts]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 12
    (folders / "val").rename(folders / "unused")
    assert len(open_set("IMNET", folders, False, val_fraction=0.25)) == 3


def test_folder_mistakes(folders, tmp_path_factory):
    def refused(kind, match, path=folders, is_train=False, **options):
        with pytest.raises(kind, match=match):
            open_set("IMNET", path, is_train, **options)

    refused(OptionError, "--data-path: .*does not exist", folders / "nowhere")
    refused(OptionError, "--data-path: IMNET needs the folder", "")
    refused(OptionError, r"--data-path: .*--val-fraction 0\.1", folders / "train")
    refused(OptionError, "has no class folders: expected", tmp_path_factory.mktemp("empty"))
    refused(OptionError, "--val-fraction: .*own validation part", val_fraction=0.1)
    save(folders / "val/dog/0.png")
    refused(DataError, r"val/dog: no class of that name")
    (folders / "val/dog/0.png").unlink()
    (folders / "val/dog").rmdir()
    for file in (folders / "val/bee").iterdir():
        file.unlink()
    val = open_set("IMNET", folders, False)
    assert val.targets.tolist() == [0, 0, 2, 2]
    assert "has no images of 1 classes: bee" in findings(val)[0]
    (folders / "train/eel").mkdir()
    refused(DataError, r"train/eel holds no images", is_train=True)
    (folders / "val").rename(folders / "unused")
    refused(OptionError, r"no val/ folder: add one, or --val-fraction", is_train=True)


@pytest.mark.parametrize(("train", "val"), [("Training", "Testing"), ("TRAIN", "TEST")])
def test_parts_with_other_names_are_never_classes(folders, train, val):
    (folders / "train").rename(folders / train)
    (folders / "val").rename(folders / val)
    parts = [open_set("IMNET", folders, is_train) for is_train in (True, False)]
    assert [len(part) for part in parts] == [12, 6]
    assert parts[0].classes == parts[1].classes == ["ant", "bee", "cat"]
    with pytest.raises(OptionError, match=f"own validation part.*--data-path {folders}/{train}"):
        open_set("IMNET", folders, val_fraction=0.5)


def test_an_unusable_validation_part_leaves_the_share_that_is_held_out(folders):
    shutil.rmtree(folders / "val")
    save(folders / "test" / "1.png")
    with pytest.raises(OptionError, match=r"test holds 1 images and no class .*--val-fraction 0.1"):
        open_set("IMNET", folders)
    train, val = (open_set("IMNET", folders, t, val_fraction=0.25) for t in (True, False))
    assert (len(train), len(val)) == (9, 3)
    assert findings(train, val) == [
        f"{folders}/test holds 1 images and no class folders: it isn't used"
    ]


def test_images_without_class_folders_are_explained(tmp_path):
    save(tmp_path / "train" / "1.png")
    (tmp_path / "labels.csv").write_text("id,label\n1,a\n")
    command = f"--data-path {tmp_path}/labels.csv --image-root {tmp_path}/train"
    for path, kind in ((tmp_path, DataError), (tmp_path / "train", OptionError)):
        with pytest.raises(kind, match=f"no class folders, but 1 images: .*{command}"):
            open_set("IMNET", path, val_fraction=0.5)
    data = DataOptions(data_set="IMNET", data_path=str(tmp_path / "train"))
    with pytest.raises(OptionError, match=r"holds 1 images and no class folders.*tools\.predict"):
        build_dataset(False, data, seed=0, classes=["a"])


def test_what_is_not_used_is_said(folders):
    save(folders / "train" / "loose.png")
    save(folders / "val" / "loose.png")
    (folders / "train" / "eel").symlink_to("nowhere")
    gone, beside, in_val = findings(*(open_set("IMNET", folders, t) for t in (True, False)))
    assert "train: eel is a link that leads nowhere: not read" in gone
    assert "train: 1 images lie beside the class folders: not used (loose.png)" in beside
    assert "val: 1 images lie beside the class folders" in in_val


def test_classes_that_differ_in_case_are_told(folders):
    (folders / "val" / "ant").rename(folders / "val" / "Ant")
    with pytest.raises(DataError, match="val/Ant: no class of that name in .*did you mean ant"):
        open_set("IMNET", folders, is_train=False)


@pytest.mark.parametrize("path", ["train", "train/bee", "train/bee/more", "val", "val/cat"])
def test_a_folder_without_permission_is_named(folders, monkeypatch, path):
    """The whole set is refused, so that there are never fewer images without a word."""
    save(folders / "train" / "bee" / "more" / "9.png")
    real, bad = os.scandir, str(folders / path)

    def scandir(folder):
        if str(folder) == bad:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=rf"{path}: Permission denied \(give this user"):
        for is_train in (True, False):
            open_set("IMNET", folders, is_train)


def test_a_name_that_is_too_long_is_one_line():
    with pytest.raises(OptionError, match="--data-path: /x+: File name too long"):
        open_set("IMNET", "/" + "x" * 300)
