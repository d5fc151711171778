"""pipeline/sources/base.py: splits and subsets."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tiny_sets import EVAL, array_set, expected

from pipeline.sources.base import (
    FileSource,
    Subset,
    held_out,
    image_numbers,
    may_be_shared,
    stratified_split,
)


def test_stratified_split_keeps_proportions():
    labels = np.array([0] * 100 + [1] * 40 + [2] * 2 + [3])
    np.random.RandomState(1).shuffle(labels)
    train, val = stratified_split(labels, 0.2, seed=0)
    assert np.bincount(labels[val], minlength=4).tolist() == [20, 8, 1, 0]
    assert sorted([*train, *val]) == list(range(143))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)
    assert np.array_equal(val, stratified_split(labels, 0.2, seed=0)[1])
    assert not np.array_equal(val, stratified_split(labels, 0.2, seed=1)[1])
    two = stratified_split([0, 0, 1, 1], 0.9, seed=0)
    assert [len(part) for part in two] == [2, 2]


def test_subset_keeps_labels_and_names():
    dataset = array_set(12, transform=EVAL).subset([11, 0])
    assert dataset.targets.tolist() == [2, 0] and dataset.classes == ["a", "b", "c"]
    assert dataset.sample_id(0) == "arrays#11"
    assert dataset[0].target == 2
    assert torch.equal(dataset[0].image, expected(11))


def files(names: list[str], root: str = "/data") -> FileSource:
    return FileSource(Path(root), names, [i % 2 for i in range(len(names))], ["a", "b"])


def names_of(source) -> set[str]:
    return {source.identity(i) for i in range(len(source))}


def test_an_image_keeps_its_number_when_the_set_moves_or_grows():
    names = [f"c/{i}.png" for i in range(50)]
    numbers = image_numbers(files(names))
    assert numbers.dtype == np.int64 and len(set(numbers.tolist())) == 50
    assert np.array_equal(numbers, image_numbers(files(names, "/elsewhere")))
    assert np.array_equal(numbers[10:], image_numbers(files(names[10:])))
    expected = hashlib.blake2b(b"c/7.png", digest_size=8).digest()
    assert numbers[7] == int.from_bytes(expected, "little", signed=True)


def test_what_was_held_out_stays_held_out():
    names = [f"c/{i}.png" for i in range(40)]
    val = held_out(files(names), False, 0.25, seed=0)
    numbers, before = image_numbers(val), names_of(val)
    for changed in (names, names[5:], [*names, "c/new.png", "c/newer.png"]):
        for seed in (0, 1):
            train, val = (held_out(files(changed), part, 0.25, seed) for part in (True, False))
            train, val = (part.as_held_out(numbers) for part in (train, val))
            assert names_of(val) == before & set(changed)
            assert names_of(train) == set(changed) - before
            assert train.targets.tolist() == [
                i % 2 for i, name in enumerate(changed) if name not in before
            ]
    # Listed twice, an image may be on both sides: the same draw stays as it was.
    twice = files([*names, *names])
    parts = [held_out(twice, part, 0.25, seed=0) for part in (True, False)]
    assert names_of(parts[0]) & names_of(parts[1])
    numbers = image_numbers(parts[1])
    for part in parts:
        assert np.array_equal(part.as_held_out(numbers).indices, part.indices)
    # Of a set without any of them, a part is as it was drawn.
    other = held_out(files([f"d/{i}.png" for i in range(40)]), False, 0.25, seed=1)
    assert other.as_held_out(numbers) is other


class OfAPlugin(FileSource):
    """May need what its factory leaves in a process."""


class Declared(FileSource):
    shareable = True


def test_a_class_says_for_itself_that_it_may_be_shared():
    shared = {
        kind: may_be_shared(kind(Path("x"), ["a", "b"], [0, 1], ["a", "b"]))
        for kind in (FileSource, OfAPlugin, Declared)
    }
    assert shared == {FileSource: True, OfAPlugin: False, Declared: True}
    for kind, answer in shared.items():
        inner = kind(Path("x"), ["a"] * 9, [0] * 9, ["a"])
        assert may_be_shared(held_out(Subset(inner, range(8)), True, 0.5, 0)) is answer
