"""pipeline/sources/folders.py: one folder per class."""

import logging
import pickle

import numpy as np
import pytest
import torch
from tiny_sets import expected, open_set, save

from errors import DataError, OptionError


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


def test_folder_mistakes(folders, tmp_path_factory, caplog):
    def refused(kind, match, path=folders, is_train=False, **options):
        with pytest.raises(kind, match=match):
            open_set("IMNET", path, is_train, **options)

    refused(OptionError, "--data-path: .*does not exist", folders / "nowhere")
    refused(OptionError, "--data-path: IMNET needs the folder", "")
    refused(OptionError, r"--data-path: .*--val-fraction 0\.1", folders / "train")
    refused(OptionError, "has no train/", tmp_path_factory.mktemp("empty"))
    refused(OptionError, "--val-fraction: .*own validation part", val_fraction=0.1)
    save(folders / "val/dog/0.png")
    refused(DataError, r"val/dog: no class of that name")
    (folders / "val/dog/0.png").unlink()
    (folders / "val/dog").rmdir()
    for file in (folders / "val/bee").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert open_set("IMNET", folders, False).targets.tolist() == [0, 0, 2, 2]
    assert "has no images of 1 classes: bee" in caplog.text
    (folders / "train/eel").mkdir()
    refused(DataError, r"train/eel holds no images", is_train=True)
    (folders / "val").rename(folders / "unused")
    refused(OptionError, r"no val/ folder: add one, or --val-fraction", is_train=True)
