"""pipeline/loader.py: the same batches for any number of workers; workers that die or hang."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hanging import held_open
from PIL import Image
from tiny_sets import EVAL, array_set, assert_same, load

from augmentation.batch import BatchAugment
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import EvalTransform
from config import AugmentOptions
from errors import DataError, OptionError
from pipeline.dataset import ImageDataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource, FileSource, Source
from samplers import EvalSampler, RASampler, ShuffleSampler


@pytest.mark.parametrize("kind", [ShuffleSampler, RASampler])
def test_batches_do_not_depend_on_the_worker_count(kind):
    dataset = array_set()
    runs = []
    for num_workers in (0, 1, 2):
        sampler = kind(13, seed=1)
        sampler.set_epoch(2)
        runs.append(load(dataset, sampler, num_workers))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    other = kind(13, seed=1)
    other.set_epoch(3)
    assert not torch.equal(load(dataset, other)[0].images, runs[0][0].images)


@pytest.mark.parametrize("side", [16, 40])
def test_inputs_do_not_depend_on_who_augments(side):
    """The main process, or workers before they hand a batch over, in mid-epoch too."""
    preprocessing = Preprocessing(side, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    augment = BatchAugment(preprocessing, AugmentOptions(reprob=0.5, vflip=0.3), 3)
    dataset = array_set(13, transform=augment)

    def inputs(num_workers: int, alter: bool, start: int = 0) -> list[torch.Tensor]:
        sampler = ShuffleSampler(13, seed=1)
        sampler.set_epoch(2, start=start)
        loader = Loader(dataset, sampler, LoaderSettings(4, num_workers, alter=alter))
        batches = list(loader)
        assert all(b.images.dtype == torch.uint8 for b in batches)
        assert any(b.plan.flips.any() or b.plan.kinds.any() for b in batches) is not alter
        return [augment(b.images, b.plan) for b in batches]

    expected = inputs(0, False)
    for num_workers, alter in ((0, True), (1, True), (2, True), (2, False)):
        found = inputs(num_workers, alter)
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    tail = inputs(2, True, start=8)
    assert all(torch.equal(x, y) for x, y in zip(expected[2:], tail, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_mid_epoch_gives_the_tail(num_workers):
    dataset, sampler = array_set(), ShuffleSampler(13, seed=1)
    sampler.set_epoch(5)
    whole = load(dataset, sampler)
    sampler.set_epoch(5, start=8)
    assert_same(whole[2:], load(dataset, sampler, num_workers))


def test_persistent_workers_follow_the_epoch():
    dataset, sampler = array_set(), ShuffleSampler(13, seed=1)
    loader = Loader(dataset, sampler, LoaderSettings(batch_size=4, num_workers=1, drop_last=True))
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert_same(list(loader), load(dataset, sampler, drop_last=True))


def test_two_processes_see_what_one_sees():
    """Rank r of two has every second sample of the single process's batches."""
    dataset = array_set(12)
    single = load(dataset, ShuffleSampler(12, seed=1), batch_size=12)[0]
    for rank in range(2):
        sampler = ShuffleSampler(12, num_replicas=2, rank=rank, seed=1)
        part = load(dataset, sampler, batch_size=6)[0]
        assert torch.equal(part.images, single.images[rank::2])
        assert torch.equal(part.positions, single.positions[rank::2])


def test_two_loaders_of_one_data_set_do_not_disturb_each_other():
    dataset = array_set()
    alone = load(dataset, ShuffleSampler(13, seed=1))
    many, few = (
        iter(Loader(dataset, ShuffleSampler(13, seed=1), LoaderSettings(4, num_workers=count)))
        for count in (2, 1)
    )
    batches, others = zip(*zip(many, few, strict=True), strict=True)
    assert_same(batches, alone)
    assert_same(others, alone)


def test_evaluation_covers_the_set_in_shares():
    dataset = array_set(13, is_train=False, transform=EVAL)
    seen = [
        (index, target)
        for rank in range(3)
        for batch in load(dataset, EvalSampler(13, num_replicas=3, rank=rank))
        for index, target in zip(batch.indices.tolist(), batch.targets.tolist(), strict=True)
    ]
    assert sorted(seen) == [(i, i % 3) for i in range(13)]


class Killer(Source):
    classes, targets = ["a"], np.zeros(4, dtype=np.int64)

    def open(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def sample_id(self, index):
        return f"killer#{index}"


def test_a_killed_worker_is_a_clear_error():
    with pytest.raises(DataError, match=r"killer#0: a worker died.*/dev/shm.*--num-worker"):
        load(ImageDataset(Killer(), EVAL), EvalSampler(4), num_workers=1)


class Buggy(Source):
    classes, targets = ["a"], np.zeros(4, dtype=np.int64)

    def open(self, index):
        raise ZeroDivisionError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bugs_keep_their_type(num_workers):
    with pytest.raises(ZeroDivisionError):
        load(ImageDataset(Buggy(), EVAL), EvalSampler(4), num_workers=num_workers)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(OptionError, match="--batch-size: 14 is more than the 13"):
        load(array_set(), ShuffleSampler(13), batch_size=14, drop_last=True)


# --- workers that die or hang ---------------------------------------------------------------------


class Deadly(ArraySource):
    """Reading image 5 kills the process, the first ``times`` times."""

    def __init__(self, folder: Path, times: int, number: int = signal.SIGKILL) -> None:
        images = np.arange(16, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
        super().__init__(images, [0, 1] * 8, ["a", "b"], "deadly")
        self.folder, self.times, self.number = folder, times, number

    def open(self, index: int) -> np.ndarray:
        died = len(list(self.folder.iterdir()))
        if index == 5 and died < self.times:
            (self.folder / str(died)).touch()
            os.kill(os.getpid(), self.number)
        return super().open(index)


def loader_of(source, on_bad_image: str, *, is_train: bool = True, timeout: float = 0):
    preprocessing = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    dataset = ImageDataset(
        source,
        EvalTransform(preprocessing),
        is_train=is_train,
        on_bad_image=on_bad_image,
    )
    count = len(dataset)
    sampler = ShuffleSampler(count) if is_train else EvalSampler(count)
    settings = LoaderSettings(batch_size=4, num_workers=2, drop_last=is_train, timeout=timeout)
    return Loader(dataset, sampler, settings)


def contents(batches) -> list:
    return [(b.images.sum((1, 2, 3)).tolist(), b.indices.tolist(), b.bad) for b in batches]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_dies_once_changes_nothing(tmp_path, caplog, number):
    """Killed, or by the bus error of a full /dev/shm: the same batches, then and later."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "dying").mkdir()
    expected = contents(loader_of(Deadly(tmp_path / "whole", 0), "skip"))
    loader = loader_of(Deadly(tmp_path / "dying", 1, number), "skip")
    assert contents(loader) == expected
    assert "a worker died over it: deadly#5" in caplog.text
    assert contents(loader) == expected
    assert len(list((tmp_path / "dying").iterdir())) == 1


def test_an_image_that_kills_twice_is_given_up(tmp_path):
    loader = loader_of(Deadly(tmp_path, 99), "skip")
    batches = contents(loader)
    indices = [i for _, batch, _ in batches for i in batch]
    assert sorted(indices) == sorted([*range(5), *range(6, 16), 6])  # the next one in its place
    assert [b for *_, bad in batches for b in bad] == ["deadly#5: a worker died over it"]
    assert len(list(tmp_path.iterdir())) == 2
    assert contents(loader) == batches


def test_a_deadly_image_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"deadly#5.*--on-bad-image skip.*shared memory"):
        contents(loader_of(Deadly(tmp_path, 99), "error"))


@pytest.fixture
def hanging(tmp_path, monkeypatch) -> FileSource:
    """Eight images; number 2 is a pipe that nobody writes to, so opening it never returns."""
    monkeypatch.setattr(os, "open", held_open)
    paths = []
    for i in range(8):
        paths.append(f"{i}.png")
        if i == 2:
            os.mkfifo(tmp_path / "2.png")
        else:
            Image.new("RGB", (8, 8), (30 * i,) * 3).save(tmp_path / f"{i}.png")
    return FileSource(tmp_path, paths, [0, 1] * 4, ["a", "b"])


def test_an_image_that_hangs_is_replaced_and_named(hanging):
    loader = loader_of(hanging, "skip", timeout=1.5)
    batches = contents(loader)
    indices = [i for _, batch, _ in batches for i in batch]
    assert sorted(indices) == [0, 1, 3, 3, 4, 5, 6, 7]
    bad = [line for *_, lines in batches for line in lines]
    assert len(bad) == 1 and bad[0].endswith("2.png: not read within 1.5 s")


def test_an_image_that_hangs_is_left_out_of_evaluation(hanging):
    batches = contents(loader_of(hanging, "skip", is_train=False, timeout=1.5))
    assert [i for _, batch, _ in batches for i in batch] == [0, 1, 3, 4, 5, 6, 7]


def test_an_image_that_hangs_is_an_error_that_names_it(hanging):
    with pytest.raises(DataError, match=r"2\.png: not read within 1\.5 s.*--on-bad-image skip"):
        contents(loader_of(hanging, "error", timeout=1.5))
