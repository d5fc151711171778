"""pipeline/sources/names.py: many names in one block."""

import os
import pickle

import numpy as np
import pytest

from pipeline.sources.names import Names, NamesByFolder


def test_names_are_those_that_were_given():
    given = [b"a", b"", b"long" * 100, "é".encode()]
    names = Names(given)
    assert list(names) == given and len(names) == 4
    assert names[np.int64(2)] == b"long" * 100
    for index in (-1, 4):
        with pytest.raises(IndexError):
            names[index]
    assert list(Names([])) == []


@pytest.mark.parametrize("more", ["", "é.png", os.fsdecode(b"caf\xe9.png")])
def test_files_of_folders_make_the_same_names(more):
    """Also those that are not ASCII, or not UTF-8."""
    files = {"a": ["1.png", "22.png"], "b/c": [], "d": ["3.png", *filter(None, [more])]}
    found = NamesByFolder()
    for folder, each in files.items():
        found.add(folder, each)
    names = found.names()
    wanted = [os.fsencode(f"{folder}/{name}") for folder, each in files.items() for name in each]
    assert list(names) == wanted
    assert names.chosen(np.array([2, 0])) == [wanted[2], wanted[0]]
    assert names.run(1, 3) == Names(wanted).run(1, 3) != names.run(0, 2)
    assert list(pickle.loads(pickle.dumps(names))) == wanted
