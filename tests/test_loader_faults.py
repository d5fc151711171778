"""Loader processes that die or hang: named, handled as --on-bad-image says, counted."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from augment import Preprocessing
from config import AugmentOptions
from datasets import ArraySource, FileSource, ImageDataset, build_loader, build_transform
from errors import DataError
from samplers import EvalSampler, ShuffleSampler


class Deadly(ArraySource):
    """Reading picture 5 kills the process, the first ``times`` times."""

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
        build_transform(False, preprocessing, AugmentOptions()),
        is_train=is_train,
        on_bad_image=on_bad_image,
    )
    count = len(dataset)
    sampler = ShuffleSampler(count) if is_train else EvalSampler(count)
    return build_loader(
        dataset, sampler, batch_size=4, num_workers=2, pin_memory=False, drop_last=is_train,
        seed=0, timeout=timeout,
    )  # fmt: skip


def contents(batches) -> list:
    return [(b.images.sum((1, 2, 3)).tolist(), b.indices.tolist(), b.bad) for b in batches]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_loader_that_dies_once_changes_nothing(tmp_path, caplog, number):
    """Killed, or by the bus error of a full /dev/shm: the same batches, then and later."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "dying").mkdir()
    expected = contents(loader_of(Deadly(tmp_path / "whole", 0), "skip"))
    loader = loader_of(Deadly(tmp_path / "dying", 1, number), "skip")
    assert contents(loader) == expected
    assert "a loader process died over it: deadly#5" in caplog.text
    assert contents(loader) == expected
    assert len(list((tmp_path / "dying").iterdir())) == 1


def test_a_picture_that_kills_twice_is_given_up(tmp_path):
    loader = loader_of(Deadly(tmp_path, 99), "skip")
    batches = contents(loader)
    indices = [i for _, batch, _ in batches for i in batch]
    assert sorted(indices) == sorted([*range(5), *range(6, 16), 6])  # the next one in its place
    assert [b for *_, bad in batches for b in bad] == ["deadly#5: a loader process died over it"]
    assert len(list(tmp_path.iterdir())) == 2
    assert contents(loader) == batches


def test_a_deadly_picture_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"deadly#5.*--on-bad-image skip.*shared memory"):
        contents(loader_of(Deadly(tmp_path, 99), "error"))


@pytest.fixture
def hanging(tmp_path) -> FileSource:
    """Eight pictures; number 2 is a pipe that nobody writes to, so opening it never returns."""
    paths = []
    for i in range(8):
        paths.append(f"{i}.png")
        if i == 2:
            os.mkfifo(tmp_path / "2.png")
        else:
            Image.new("RGB", (8, 8), (30 * i,) * 3).save(tmp_path / f"{i}.png")
    return FileSource(tmp_path, paths, [0, 1] * 4, ["a", "b"])


def test_a_picture_that_hangs_is_replaced_and_named(hanging):
    loader = loader_of(hanging, "skip", timeout=1.5)
    batches = contents(loader)
    indices = [i for _, batch, _ in batches for i in batch]
    assert sorted(indices) == [0, 1, 3, 3, 4, 5, 6, 7]
    bad = [line for *_, lines in batches for line in lines]
    assert len(bad) == 1 and bad[0].endswith("2.png: not read within 1.5 s")


def test_a_picture_that_hangs_is_left_out_of_evaluation(hanging):
    batches = contents(loader_of(hanging, "skip", is_train=False, timeout=1.5))
    assert [i for _, batch, _ in batches for i in batch] == [0, 1, 3, 4, 5, 6, 7]


def test_a_picture_that_hangs_is_an_error_that_names_it(hanging):
    with pytest.raises(DataError, match=r"2\.png: not read within 1\.5 s.*--on-bad-image skip"):
        contents(loader_of(hanging, "error", timeout=1.5))
