"""pipeline/sources/lookup.py: the files that a list names."""

import os

import pytest

from errors import DataError
from pipeline.sources.lookup import ImageFiles, where_it_lies


@pytest.fixture
def root(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "a/2.png", "a/3.tar.jpeg", "a/4.txt", "b/5.PNG", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a/1.jpg", ["a/1.jpg"]),
        ("a/1", ["a/1.jpg"]),
        ("a/2", ["a/2.jpg", "a/2.png"]),
        ("a/2.png", ["a/2.png"]),
        ("a/3.tar", ["a/3.tar.jpeg"]),
        ("a/4", []),
        ("a/4.txt", ["a/4.txt"]),
        ("a\\1.jpg", ["a/1.jpg"]),
        (".\\b\\5", ["./b/5.PNG"]),
        ("b/../a/1", ["b/../a/1.jpg"]),
        ("a/1.png", []),
        ("5", []),
        ("c/1", []),
        ("a/1.jpg/2", []),
        ("a/" + "x" * 300, []),
        ("x" * 300 + "/1", []),
        ("a\0b/1", []),
    ],
)
def test_names_with_and_without_extension(root, name, found):
    files = ImageFiles(root)
    assert files.find(name) == found
    assert all((root / path).is_file() for path in found)


def test_a_name_without_a_folder_is_found_in_those_below_if_asked_for(root):
    files = ImageFiles(root, anywhere=True)
    assert files.find("5") == files.find("5.PNG") == ["b/5.PNG"]
    assert sorted(files.find("1")) == ["a/1.jpg", "b/1.jpg"]
    assert files.find("c/5") == []


def test_each_folder_is_read_once(root, monkeypatch):
    read, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(str(path)) or real(path))
    files = ImageFiles(root)
    assert [len(files.find(f"a/{i}")) for i in range(1, 4)] == [1, 2, 0]
    assert read == [str(root / "a")]


def test_a_folder_without_permission_is_named(root, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="/a: Permission denied .*chmod"):
        ImageFiles(root).find("a/1")


def test_where_missing_files_lie(root):
    assert where_it_lies("5", root) == root / "b"
    assert where_it_lies("b/5", root / "a") == root.resolve()
    assert where_it_lies("9", root) is None
