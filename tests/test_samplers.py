"""samplers.py: who sees which image when."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import (
    LANES,
    BalancedSampler,
    EvalSampler,
    RASampler,
    SampleKey,
    ShuffleSampler,
    UndersampleSampler,
    by_groups,
)

SIZES = st.integers(0, 60)
WORLDS = st.integers(1, 8)
examples = settings(deadline=None, max_examples=40, derandomize=True)


def of_all_ranks(make, num_replicas, epoch=0, start=0):
    """The keys of every rank."""
    keys = []
    for rank in range(num_replicas):
        sampler = make(num_replicas=num_replicas, rank=rank)
        sampler.set_epoch(epoch, start)
        keys.append(list(sampler))
        assert len(sampler) == len(keys[-1])
    return keys


@examples
@given(size=SIZES, world=WORLDS, epoch=st.integers(0, 3), data=st.data())
def test_ranks_share_out_the_global_sequence(size, world, epoch, data):
    start = data.draw(st.integers(0, size))
    for kind in (ShuffleSampler, RASampler):
        ranks = of_all_ranks(lambda kind=kind, **k: kind(size, seed=5, **k), world, epoch, start)
        assert {len(keys) for keys in ranks} == {(size - start) // world}
        dealt = [key for step in zip(*ranks, strict=True) for key in step]
        order = kind(size, seed=5).order(epoch).tolist()
        positions = range(start, start + len(dealt))
        assert dealt == [SampleKey(order[p], epoch, p) for p in positions]


@examples
@given(size=SIZES)
def test_shuffle_shows_every_image_once(size):
    assert sorted(ShuffleSampler(size).order(0).tolist()) == list(range(size))


def test_start_gives_the_tail():
    whole, tail = (
        ShuffleSampler(20, num_replicas=2, rank=1),
        ShuffleSampler(20, num_replicas=2, rank=1),
    )
    whole.set_epoch(3)
    tail.set_epoch(3, start=8)
    assert list(tail) == list(whole)[4:]
    assert len(tail) == 6


@examples
@given(size=st.integers(1, 60), repeats=st.integers(1, 4))
def test_repeated_augmentation_repeats_in_a_row(size, repeats):
    order = RASampler(size, num_repeats=repeats).order(1).tolist()
    assert len(order) == size
    groups = [order[i : i + repeats] for i in range(0, size, repeats)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == len(groups)


def test_repeated_augmentation_has_three_copies_and_small_epochs():
    # DeiT's own sampler rounds down to multiples of 256 and would give an empty epoch here.
    sampler = RASampler(10)
    assert len(list(sampler)) == 10
    assert len(set(sampler.order(0).tolist())) == 4


@pytest.mark.parametrize(
    "make",
    [
        ShuffleSampler,
        RASampler,
        lambda n, **k: BalancedSampler([0, 1] * (n // 2), **k),
        lambda n, **k: UndersampleSampler([0] * (n - 9) + [1] * 9, **k),
    ],
)
def test_seed_and_epoch_decide_the_order(make):
    first = make(40, seed=1).order(2)
    assert torch.equal(first, make(40, seed=1).order(2))
    assert not torch.equal(first, make(40, seed=2).order(2))
    assert not torch.equal(first, make(40, seed=1).order(3))
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    make(40, seed=1).order(2)
    assert torch.equal(torch.rand(1), expected)


def test_balanced_draws_classes_equally_and_images_equally_within():
    targets = np.array([0] * 900 + [2] * 90 + [5] * 10)
    np.random.RandomState(0).shuffle(targets)
    sampler = BalancedSampler(targets)
    drawn = torch.cat([sampler.order(epoch) for epoch in range(30)]).numpy()
    shares = np.bincount(targets[drawn], minlength=6) / len(drawn)
    # 30000 draws: the std of a share is 0.003
    assert shares[[0, 2, 5]] == pytest.approx(1 / 3, abs=0.015)
    assert shares[[1, 3, 4]].sum() == 0
    rare = np.bincount(drawn, minlength=1000)[targets == 5]
    assert rare.min() > 800 and rare.max() < 1200


@pytest.mark.parametrize("groups", [None, np.arange(400) // 25], ids=["files", "shards"])
def test_undersampling_draws_as_many_of_each_class_as_the_rarest_has(groups):
    targets = np.array([0] * 300 + [2] * 88 + [5] * 12)
    np.random.RandomState(0).shuffle(targets)
    sampler = UndersampleSampler(targets, groups=groups)
    assert sampler.num_samples == len(sampler) == 36
    seen = np.zeros(400, int)
    for epoch in range(200):
        drawn = sampler.order(epoch).numpy()
        assert len(set(drawn)) == 36
        assert np.bincount(targets[drawn], minlength=6).tolist() == [12, 0, 12, 0, 0, 12]
        seen[drawn] += 1
    # All of the rarest each epoch, of the others each as often as the next: 8 ± 2.8 of class 0.
    assert (seen[targets == 5] == 200).all()
    for label, expected in ((0, 200 * 12 / 300), (2, 200 * 12 / 88)):
        of_class = seen[targets == label]
        assert of_class.mean() == expected and of_class.std() < 2 * expected**0.5
        assert of_class.min() > 0


def test_undersampling_mixes_the_classes_and_is_the_same_for_every_number_of_processes():
    targets = np.repeat([0, 1, 2], [50, 20, 90])
    order = UndersampleSampler(targets, seed=3).order(4)
    places = np.argsort(targets[order], kind="stable").reshape(3, 20)
    assert (abs(places.mean(1) - 29.5) < 12).all()  # no class comes first: the std is 3.1
    for world in (1, 2, 4):
        ranks = of_all_ranks(
            lambda **k: UndersampleSampler(targets, seed=3, **k), world, epoch=4, start=8
        )
        dealt = [key.index for step in zip(*ranks, strict=True) for key in step]
        assert dealt == order[8:].tolist()


@examples
@given(size=SIZES, world=WORLDS)
def test_evaluation_covers_everything_exactly_once(size, world):
    ranks = [EvalSampler(size, num_replicas=world, rank=r) for r in range(world)]
    keys = [key for sampler in ranks for key in sampler]
    assert sorted(key.index for key in keys) == list(range(size))
    assert all(key == SampleKey(key.index, 0, key.index) for key in keys)
    assert [len(s) for s in ranks] == [len(list(s)) for s in ranks]
    assert [k.index for k in ranks[-1]] == list(range(world - 1, size, world))


# --- order of shards ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[5], [3, 9, 1], [7] * 200, [1, 50] * 70])
def test_order_by_groups_is_a_permutation(sizes):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    orders = [by_groups(groups, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(orders[0].sort().values, torch.arange(len(groups)))
    assert torch.equal(orders[0], orders[1])
    assert len(sizes) < 3 or not torch.equal(orders[0], orders[2])


def test_few_shards_are_in_use_at_a_time_and_a_batch_comes_from_many():
    groups = np.repeat(np.arange(640), 100)
    order = by_groups(groups, torch.Generator().manual_seed(0)).numpy()
    used = groups[order]
    first = np.full(640, -1)
    last = np.full(640, -1)
    for place, group in enumerate(used):
        last[group] = place
        if first[group] < 0:
            first[group] = place
    open_at = [((first <= p) & (p <= last)).sum() for p in range(0, len(used), 1000)]
    assert max(open_at) <= 2 * LANES
    assert len(set(used[:256])) > 100
    # Within a shard the order is random.
    inside = order[used == used[0]]
    assert abs(np.corrcoef(inside, np.arange(100))[0, 1]) < 0.4


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_read_shards_of_their_own(world):
    groups = np.repeat(np.arange(128), 30)
    seen = []
    for rank in range(world):
        sampler = ShuffleSampler(len(groups), num_replicas=world, rank=rank, groups=groups)
        indices, _ = sampler.share()
        seen.append(set(groups[indices]))
    assert set.union(*seen) == set(range(128))
    assert sum(len(s) for s in seen) == 128


def test_repeated_augmentation_keeps_the_order_of_shards():
    groups = np.repeat(np.arange(40), 10)
    order = RASampler(len(groups), groups=groups).order(0)
    assert torch.equal(order[:99].view(-1, 3)[:, 0], order[:99].view(-1, 3)[:, 2])
    plain = ShuffleSampler(len(groups), groups=groups).order(0)
    assert torch.equal(order[::3][:100], plain[:100])
