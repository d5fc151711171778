"""Workers that are killed, whatever they are at: noticed at once, and the batches stay the same."""

import contextlib
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from open_files import limit_files, most_files
from tiny_sets import EVAL, assert_same, load, train_transform

from augmentation.protocol import Transform
from errors import DataError
from pipeline.dataset import ImageDataset
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource
from samplers import EvalSampler, ShuffleSampler

COUNT = 24
PIXELS = np.random.RandomState(0).randint(0, 256, (COUNT, 20, 24, 3), dtype=np.uint8)


def data_set(on_bad_image: str = "skip", *, is_train: bool = True) -> ImageDataset:
    source = ArraySource(PIXELS, [i % 3 for i in range(COUNT)], ["a", "b", "c"], "array")
    transform = train_transform() if is_train else EVAL
    return ImageDataset(source, transform, is_train=is_train, on_bad_image=on_bad_image)


def loader_of(dataset: ImageDataset, workers: int = 2) -> Loader:
    """One whose wait for a batch would outlast any test."""
    sampler = ShuffleSampler(COUNT, seed=1) if dataset.is_train else EvalSampler(COUNT)
    return Loader(dataset, sampler, LoaderSettings(4, num_workers=workers, timeout=3600))


def kill(loader: Loader, *workers: int) -> None:
    """SIGKILL workers, and wait until they are gone."""
    for worker in workers:
        os.kill(loader.pids[worker], signal.SIGKILL)
        os.waitid(os.P_PID, loader.pids[worker], os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("workers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("is_train", [True, False])
def test_workers_killed_while_idle_between_passes(is_train, workers, caplog):
    dataset = data_set(is_train=is_train)
    expected = list(loader_of(dataset, workers=0))
    loader = loader_of(dataset)
    for _ in range(2):
        assert_same(list(loader), expected)
        kill(loader, *workers)
    assert_same(list(loader), expected)
    assert caplog.text.count("a loader worker was lost; the workers are started anew") == 2


@pytest.mark.parametrize("batches", [0, 1, 3, 5])
def test_workers_killed_with_batches_on_their_way(batches):
    """What was made ahead may be lost with its worker: it is made again."""
    dataset = data_set()
    expected = list(loader_of(dataset, workers=0))
    loader = loader_of(dataset)
    found = []
    for batch in loader:
        if len(found) == batches:
            time.sleep(0.1)
            kill(loader, 0, 1)
        found.append(batch)
    assert_same(found, expected)
    assert_same(list(loader), expected)


def test_a_worker_without_file_handles_is_an_error_of_one_line():
    class Last(ArraySource):
        def open(self, index):
            if index == COUNT - 1:
                limit_files(0)
            return super().open(index)

    dataset = ImageDataset(Last(PIXELS, [0] * COUNT, ["a"], "last"), EVAL)
    loader = Loader(dataset, EvalSampler(COUNT), LoaderSettings(4, num_workers=1))
    with pytest.raises(DataError, match="^Too many open files .*ulimit -n"):
        list(loader)


def test_a_worker_killed_at_its_last_batch_is_replaced_whatever_that_holds():
    """It has nothing left to read then, and may be within a large answer."""

    class Labelled(ArraySource):
        def read(self, index):
            return super().read(index)[0], np.ones(100_000, dtype=np.uint8)

    source = Labelled(PIXELS, [0] * COUNT, ["a"], "labelled")
    dataset = ImageDataset(source, EVAL, on_bad_image="skip")
    loader = Loader(dataset, EvalSampler(COUNT), LoaderSettings(4, num_workers=2))
    batches = iter(loader)
    counts = [len(next(batches).targets)]
    for batch in batches:
        counts.append(len(batch.targets))
        if len(counts) == len(loader) - 1:
            kill(loader, (len(loader) - 1) % 2)
    assert sum(counts) == COUNT


def test_a_main_process_without_file_handles_is_an_error_of_one_line():
    batches = iter(loader_of(data_set(), workers=1))
    next(batches)
    with most_files(0), pytest.raises(DataError, match="^Too many open files .*ulimit -n"):
        list(batches)


def test_a_dead_worker_is_an_error_of_one_line_where_none_is_to_be_skipped():
    loader = loader_of(data_set("error"))
    list(loader)
    kill(loader, 1)
    with pytest.raises(DataError) as caught:
        list(loader)
    text = str(caught.value)
    assert text.startswith("a loader worker died between two images (add --on-bad-image skip")
    assert "--num-workers" in text and "\n" not in text


def test_a_pass_that_was_left_early_does_not_reach_the_next():
    dataset = data_set()
    loader = loader_of(dataset)
    for _, _ in zip(range(2), loader, strict=False):
        pass
    assert_same(list(loader), list(loader_of(dataset, workers=0)))


def test_a_kill_at_a_random_moment_of_each_pass():
    """Of a worker that starts, is at work, hands over or is idle."""
    datasets = [data_set(), data_set(is_train=False)]
    loaders = [loader_of(dataset) for dataset in datasets]
    expected = [list(loader_of(dataset, workers=0)) for dataset in datasets]
    rng = np.random.RandomState(0)
    killed = []

    def attack(loader: Loader, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(loader.pids[number], signal.SIGKILL)
            killed.append(number)

    for _ in range(10):
        for loader, batches in zip(loaders, expected, strict=True):
            timer = threading.Timer(rng.uniform(0, 0.05), attack, (loader, rng.randint(2)))
            timer.start()
            assert_same(list(loader), batches)
            timer.join()
    assert len(killed) > 3


def test_what_a_worker_raises_keeps_its_type_and_traceback():
    class Buggy(ArraySource):
        def open(self, index):
            raise ZeroDivisionError("no such thing")

    dataset = ImageDataset(Buggy(PIXELS, [0] * COUNT, ["a"], "buggy"), EVAL)
    with pytest.raises(ZeroDivisionError, match="no such thing") as caught:
        load(dataset, EvalSampler(COUNT), num_workers=1)
    assert "in loader worker 0" in caught.value.__notes__[0]
    assert "in open" in caught.value.__notes__[0]


class Drawing(ArraySource):
    """Draws pixels from every global generator, as a plug-in may; says who made them."""

    def open(self, index):
        draws = (random.random(), np.random.rand(), torch.rand(()).item())
        info = torch.utils.data.get_worker_info()
        who = [info.id, info.num_workers, info.seed] if info else [99, 99, 99]
        values = [int(255 * draw) for draw in draws] + who
        return np.array(values, dtype=np.uint8).reshape(2, 1, 3)


def test_what_a_source_draws_follows_from_seed_and_place():
    """The same for every number of workers, other values in each batch, epoch and for each seed;
    and get_worker_info() is what torch's own loader gives."""

    class Raw(Transform):
        def apply(self, image, epoch, position):
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    dataset = ImageDataset(Drawing(PIXELS, [0] * COUNT, ["a"], "drawing"), Raw(), is_train=True)
    draws = {}
    for workers, seed, epoch in ((1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 0, 1)):
        sampler = ShuffleSampler(COUNT, seed=1)
        sampler.set_epoch(epoch)
        settings = LoaderSettings(4, num_workers=workers, seed=seed)
        batches = list(Loader(dataset, sampler, settings))
        draws[workers, seed, epoch] = torch.cat([batch.images[..., 0, 0] for batch in batches])
        made_by = [batch.images[0, :, 1, 0].tolist() for batch in batches]
        assert made_by == [[i % workers, workers, seed + i % workers] for i in range(6)]
    first, same, *others = draws.values()
    assert torch.equal(first, same)
    assert len({tuple(values.tolist()) for values in first}) == COUNT
    for other in others:
        assert (first != other).any(1).sum() > COUNT // 2


def test_a_death_is_noticed_though_a_child_of_the_worker_lives_on():
    class Forking(ArraySource):
        def open(self, index):
            if not os.fork():
                time.sleep(30)
                os._exit(0)
            return super().open(index)

    dataset = ImageDataset(Forking(PIXELS, [0] * COUNT, ["a"], "forking"), EVAL)
    loader = Loader(dataset, EvalSampler(COUNT), LoaderSettings(4, num_workers=1))
    batches = iter(loader)
    next(batches)
    kill(loader, 0)
    began = time.monotonic()
    with pytest.raises(DataError, match="worker died"):
        list(batches)
    assert time.monotonic() - began < 20


def test_workers_end_with_their_loader():
    loader = loader_of(data_set())
    list(loader)
    pids = loader.pids
    del loader
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
