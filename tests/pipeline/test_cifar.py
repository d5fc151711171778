"""pipeline/sources/cifar.py: CIFAR in torchvision's files.

Also of pipeline/sources/download.py.
"""

import pickle

import numpy as np
import pytest
from tiny_sets import open_set

from errors import DataError, OptionError


def test_cifar(tmp_path, monkeypatch):
    import torchvision

    with pytest.raises(OptionError, match="--data-path: no CIFAR10.*--download"):
        open_set("CIFAR10", tmp_path)
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    names = ["plane", "car", "bird"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for number, (file, _) in enumerate([*kind.train_list, *kind.test_list]):
        data = np.full((2, 3072), number, np.uint8)
        data[:, 0] = 200  # red of the first pixel: channels come first in the file
        (folder / file).write_bytes(pickle.dumps({"data": data, "labels": [number % 3, 1]}))
    for path in (tmp_path, folder):
        train, val = (open_set("CIFAR10", path, t) for t in (True, False))
        assert (len(train), len(val), train.classes) == (10, 2, names)
    assert train.targets.tolist() == [0, 1, 1, 1, 2, 1, 0, 1, 1, 1]
    assert train.source.images[2, 0, 0].tolist() == [200, 1, 1]
    with pytest.raises(OptionError, match="--val-fraction"):
        open_set("CIFAR10", tmp_path, val_fraction=0.1)


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    import torchvision

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    fail.base_folder = "x"
    with pytest.raises(DataError, match="CIFAR100 can't be downloaded: no route to host"):
        open_set("CIFAR", tmp_path / "new", download=True)
