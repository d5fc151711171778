"""pipeline/sources/base.py: splits and subsets."""

import numpy as np
import torch
from tiny_sets import EVAL, array_set, expected

from pipeline.sources.base import stratified_split


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
