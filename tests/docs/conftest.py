"""The folders in which the commands of the pages are run."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from after_training import train
from tiny_images import image_folder

CLASSES = ("cat", "dog")


@pytest.fixture
def before_training(tmp_path, monkeypatch) -> Path:
    """The working directory as the pages on training describe it: pets/, configs/, examples/ and
    mine.yaml."""
    image_folder(tmp_path / "pets", {"train": 32, "val": 3}, classes=CLASSES)
    for folder in ("configs", "examples"):
        shutil.copytree(pages.ROOT / folder, tmp_path / folder)
    [recipe] = pages.blocks("docs/train.md", "yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with pets/, images.csv and the run output/pets."""
    root = tmp_path_factory.mktemp("trained")
    image_folder(root / "pets", {"train": 8, "val": 6}, classes=CLASSES)
    (root / "images.csv").write_text("path\npets/val/cat/0.png\n")
    with contextlib.chdir(root):
        train(Path("pets"), Path("output/pets"), "--epochs", "3", "--keep", "9")
    return root


@pytest.fixture
def after_training(trained) -> Iterator[Path]:
    """``trained`` as the working directory; what the commands write stays for those after them."""
    with contextlib.chdir(trained):
        yield trained
