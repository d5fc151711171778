"""pipeline/sources/layout.py: which folders are training, validation, test, and which classes."""

import pytest
from tiny_sets import save

from errors import OptionError
from pipeline.sources.layout import find_layout, split_role, split_roles


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", ("train", "")),
        ("Training", ("train", "")),
        ("TRAIN", ("train", "")),
        ("training_set", ("train", "")),
        ("trainingSet", ("train", "")),
        ("trainset", ("train", "")),
        ("train2017", ("train", "")),
        ("images_train", ("train", "")),
        ("seg_train", ("train", "seg")),
        ("asl_alphabet_test", ("test", "asl_alphabet")),
        ("Testing", ("test", "")),
        ("test-images", ("test", "")),
        ("valid", ("val", "")),
        ("Validation Set", ("val", "")),
        ("dev", ("val", "")),
        ("test_tube", ("test", "tube")),
        ("trainers", None),
        ("invalid", None),
        ("train_test_split", None),
        ("cat", None),
    ],
)
def test_names_of_parts(name, role):
    assert split_role(name) == role


def test_a_name_with_a_rest_is_a_part_beside_its_like_alone():
    assert split_roles(["seg_train", "seg_test", "seg_pred"]) == {
        "seg_train": "train",
        "seg_test": "test",
    }
    assert split_roles(["test_tube", "train_track", "bottle"]) == {}
    assert split_roles(["train_labels"], ["labels"]) == {"train_labels": "train"}


def made(root, *folders, empty=()):
    """One image in each folder, none in the ``empty`` ones."""
    for folder in folders:
        save(root / folder / "0.png")
    for folder in empty:
        (root / folder).mkdir(parents=True)
    return root


def places(root):
    """The parts as paths from the root."""
    found = find_layout(root)
    parts = (found.train, found.val)
    return [p and str(p.relative_to(root)) for p in parts], found


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("training_set", "test_set"),
        ("dataset_train", "dataset_valid"),
        ("cifar_train", "cifar_test"),
        ("train2017", "val2017"),
    ],
)
def test_parts_are_found_by_their_names(tmp_path, train, val):
    made(tmp_path, *(f"{part}/{name}" for part in (train, val) for name in ("a", "b")))
    parts, found = places(tmp_path)
    assert parts == [train, val] and not found.undivided and not found.findings


def test_val_comes_before_test(tmp_path):
    made(tmp_path, "train/a", "test/a", "valid/a", "other/a")
    assert places(tmp_path)[0] == ["train", "valid"]


def test_folders_that_hold_one_folder_are_passed_through_and_named(tmp_path):
    made(tmp_path, "set/set/seg_train/seg_train/a", "set/set/seg_train/seg_train/b")
    made(tmp_path, "set/set/seg_test/seg_test/a", "set/set/seg_test/seg_test/b", "__MACOSX/set")
    parts, found = places(tmp_path)
    assert parts == ["set/set/seg_train/seg_train", "set/set/seg_test/seg_test"]
    assert found.findings[0] == (
        f"{tmp_path} holds one folder only: its images are those of {tmp_path}/set/set"
    )
    assert len(found.findings) == 3


def test_one_class_is_no_folder_too_many(tmp_path):
    made(tmp_path, "train/cat", "train/dog", "val/cat/tabby", "val/cat/tiger")
    assert places(tmp_path)[0] == ["train", "val"]
    made(tmp_path, "alone/cat")
    assert places(tmp_path / "alone") == (
        [".", None],
        (tmp_path / "alone", tmp_path / "alone", None, True, (), ()),
    )


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    made(tmp_path, "train", "bus", "car")
    assert places(tmp_path)[1].undivided
    made(tmp_path, "set/valid", "set/invalid")
    assert places(tmp_path / "set")[1].undivided


@pytest.mark.parametrize(
    ("folders", "empty", "problem"),
    [
        (["test"], [], "test holds 1 images and no class folders"),
        (["test/test"], [], "test/test holds 1 images and no class folders"),
        (["val/images"], [], "val/images holds 1 images and no class folders"),
        ([], ["val"], "val is empty"),
        ([], ["val/a", "val/b"], "val holds no images"),
    ],
)
def test_what_cannot_be_a_validation_part_is_named(tmp_path, folders, empty, problem):
    made(tmp_path, "train/a", "train/b", *folders, empty=empty)
    parts, found = places(tmp_path)
    assert parts == ["train", None] and found.unusable == (f"{tmp_path}/{problem}",)
    made(tmp_path, "testing/a", "testing/b")
    if "test" in problem:
        return
    parts, found = places(tmp_path)
    assert parts == ["train", "testing"] and found.unusable == ()
    assert found.findings == (f"{tmp_path}/{problem}: {tmp_path}/testing is the validation part",)


def test_links_in_a_circle_are_no_classes_and_no_parts(tmp_path):
    made(tmp_path, "train/a", "train/b")
    (tmp_path / "val").symlink_to("train")
    (tmp_path / "train" / "self").symlink_to(".")
    parts, found = places(tmp_path)
    assert parts == ["train", "val"]
    [same] = [text for text in found.findings if "itself" in text]
    assert same.endswith("training images are validated on")


def test_what_may_mean_several_things_is_refused(tmp_path):
    made(tmp_path / "x", "a/train", "a/test", "b/train", "b/test")
    with pytest.raises(OptionError, match=r"parts in the class folders \(b/test\): move them"):
        find_layout(tmp_path / "x")
    made(tmp_path / "y", "train_1/a", "train_2/a", "test/a")
    with pytest.raises(OptionError, match="several parts for train: train_1, train_2"):
        find_layout(tmp_path / "y")
    made(tmp_path / "z", "Train/a", "train/a", "test/a")
    parts, found = places(tmp_path / "z")
    assert parts[0] == "train" and "Train is not used" in found.findings[0]
