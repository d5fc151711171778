"""What the tests of the tools share: images, and checkpoints that were trained on them."""

from pathlib import Path

import numpy as np
import pytest
from after_training import train
from PIL import Image
from serving import running
from tiny_images import image_folder

CNN = ("--model", "resnet10t", "--input-size", "32", "--keep", "9")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """8 training and 6 validation images of each of three classes, 20×18 pixels."""
    folder = tmp_path_factory.mktemp("images")
    return image_folder(folder, {"train": 8, "val": 6}, size=(20, 18))


@pytest.fixture(scope="session")
def checkpoint(images, tmp_path_factory) -> Path:
    """A DeiT of two epochs on ``images``."""
    return train(images, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def cnn_run(images, tmp_path_factory) -> Path:
    """The folder of a run whose model has batch norm; both epochs are kept."""
    return train(images, tmp_path_factory.mktemp("cnn"), *CNN).parent


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    """30 training and 6 validation images; 60 × 40 pixels, JPEG, brightness by class."""
    root = tmp_path_factory.mktemp("data") / "pets"
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                pixels = rng.integers(80 * label, 80 * label + 40, (40, 60, 3))
                path = root / part / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    return root


@pytest.fixture(scope="module")
def served(checkpoint):
    """(service, port) of a server that answers with ``checkpoint``."""
    with running(checkpoint) as found:
        yield found


@pytest.fixture
def port(served) -> int:
    """Where ``served`` listens."""
    return served[1]
