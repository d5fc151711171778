"""augmentation/own.py: registered transforms and albumentations' pipelines."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pixels import MEAN, PLAIN, PREPROCESSING, STD, pixels
from torchvision import transforms

from augmentation import own
from augmentation.batch import build_train_transform
from augmentation.own import Albumentations, OwnTransform, register_transform
from augmentation.transforms import TrainTransform
from errors import OptionError
from utils import derive_seed

IMAGE = Image.fromarray(pixels(64, 64))
WHOLE = replace(PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0))
to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(own, "_TRANSFORMS", {})


def pipeline_file(folder: Path, *steps, **changes) -> str:
    import albumentations

    path = folder / "pipeline.yaml"
    albumentations.save(albumentations.Compose(list(steps)), path, data_format="yaml")
    text = path.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


# --- registered -----------------------------------------------------------------------------------


def test_it_lies_between_flips_and_policy():
    """A transform that mirrors undoes a sure flip; what comes after it sees its result."""
    register_transform("mirror")(ImageOps.mirror)
    options = replace(WHOLE, transform="mirror", hflip=1.0, grayscale_prob=1.0)
    transform = build_train_transform(PREPROCESSING, options, 0)
    assert not transform.by_batch and transform.alone == "--transform mirror"
    grey = IMAGE.convert("L").convert("RGB")
    assert torch.equal(transform.apply(IMAGE, 0, 0), to_tensor(grey))


def test_a_class_is_called_for_its_transform():
    @register_transform("darker")
    class Darker:
        def __init__(self):
            self.factor = 0.5

        def __call__(self, image):
            return image.point(lambda level: level * self.factor)

    result = OwnTransform("darker")(IMAGE)
    assert np.abs(np.array(result) - np.array(IMAGE) * 0.5).max() <= 0.5


def test_its_draws_follow_from_the_place():
    @register_transform("drawn")
    def drawn(image):
        level = random.randrange(256), np.random.randint(256), int(torch.randint(256, (1,)))
        return Image.new("RGB", image.size, level)

    options = replace(WHOLE, transform="drawn")
    transform = TrainTransform(PREPROCESSING, options, 3)
    random.seed(1)
    first = transform.apply(IMAGE, 2, 9)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(first, transform.apply(IMAGE, 2, 9))
    colours = {tuple(transform.apply(IMAGE, e, p)[:, 0, 0].tolist()) for e, p in [(2, 8), (3, 9)]}
    assert len(colours | {tuple(first[:, 0, 0].tolist())}) == 3


@pytest.mark.parametrize(
    ("name", "transform", "said"),
    [
        ("size", lambda i: i.resize((9, 8)), "size gave back RGB of 9 × 8 pixels: it must be RGB"),
        ("mode", lambda i: i.convert("L"), "mode gave back L of 64 × 64 pixels: it must be RGB"),
        ("array", lambda i: np.array(i), "array gave back ndarray: it must be a PIL image"),
        ("none", lambda i: None, "none gave back NoneType"),
        ("raises", lambda i: i.nothing, "raises failed: AttributeError: .*nothing"),
        ("reads", lambda i: Path("/nowhere").read_text(), "reads failed: FileNotFoundError"),
    ],
)
def test_what_goes_wrong_names_it(name, transform, said):
    register_transform(name)(transform)
    with pytest.raises(OptionError, match=f"^--transform: {said}") as failure:
        OwnTransform(name)(IMAGE)
    assert "\n" not in str(failure.value)


def test_unknown_names():
    with pytest.raises(OptionError, match="--transform: .*'mirror'; add --plugin FILE"):
        OwnTransform("mirror")
    register_transform("mirrored")(ImageOps.mirror)
    with pytest.raises(OptionError, match="did you mean mirrored?"):
        OwnTransform("mirror")
    with pytest.raises(OptionError, match="'xyz'; there are mirrored"):
        OwnTransform("xyz")


def test_want_of_memory_is_not_blamed_on_it():
    def hungry(image):
        raise MemoryError

    register_transform("hungry")(hungry)
    with pytest.raises(MemoryError):
        OwnTransform("hungry")(IMAGE)


# --- albumentations -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def albumentations():
    own._library()  # as it is imported here, without asking the network for a version
    return pytest.importorskip("albumentations")


def test_the_pipeline_is_done_with_seeds_of_the_place(albumentations, tmp_path):
    a = albumentations
    steps = [a.OneOf([a.GaussNoise(p=1), a.CoarseDropout(p=1)], p=0.7), a.HorizontalFlip(p=0.5)]
    options = replace(WHOLE, albumentations=pipeline_file(tmp_path, *steps))
    transform = TrainTransform(PREPROCESSING, options, 3)
    reference, results = a.Compose(steps), []
    for epoch, position in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        results.append(transform.apply(IMAGE, epoch, position))
        random.seed(derive_seed(3, "sample", epoch, position))
        torch.manual_seed(derive_seed(3, "sample", epoch, position))
        transform.base(IMAGE)  # the crop draws first
        reference.set_random_seed(random.getrandbits(32))
        assert torch.equal(
            results[-1], to_tensor(Image.fromarray(reference(image=np.array(IMAGE))["image"]))
        )
    assert torch.equal(results[0], results[4])
    assert len({result.sum().item() for result in results}) >= 3


def test_pipelines_that_are_none(albumentations, tmp_path):
    flip = albumentations.HorizontalFlip(p=0.5)
    cases = [
        ({"HorizontalFlip": "HorizontalFilp"}, "unknown transform 'HorizontalFilp'; did you mean"),
        ({"HorizontalFlip": "os.system"}, "unknown transform 'os.system'; albumentations has none"),
        ({"p: 0.5": "p: 0.5\n    turns: 3"}, "Argument(s) 'turns' are not valid"),
        ({"p: 0.5": "p: many"}, "failed: "),
        ({"p: 0.5": "p: !!python/object/apply:os.getcwd []"}, "could not determine a constructor"),
        ({"transforms:": "p: ["}, "line "),
        ({"transform:": "other:"}, "is no pipeline: write it with albumentations.save"),
    ]
    for changes, said in cases:
        path = pipeline_file(tmp_path, flip, **changes)
        with pytest.raises(OptionError) as failure:
            Albumentations(path)
        assert str(failure.value).startswith(f"--albumentations: {path}") and said in str(
            failure.value
        )
        assert "\n" not in str(failure.value)
    with pytest.raises(OptionError, match="--albumentations: .* does not exist"):
        Albumentations(str(tmp_path / "other.yaml"))


def test_pipelines_that_change_the_form_of_images(albumentations, tmp_path):
    a = albumentations
    for step, said in [
        (a.Resize(32, 40), r"gave back uint8 \(32, 40, 3\): it must be uint8 \(64, 64, 3\)"),
        (a.Normalize(), "gave back float32"),
        (a.ToTensorV2(), "gave back torch.uint8"),
        (a.RandomCrop(128, 128), "failed: .*Error: "),
    ]:
        pipeline = Albumentations(pipeline_file(tmp_path, step))
        with pytest.raises(OptionError, match=f"^--albumentations: .*{said}"):
            pipeline(IMAGE)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "albumentations", None)
    with pytest.raises(OptionError, match="--albumentations: needs .*pip install 'albumentations"):
        Albumentations(str(tmp_path / "pipeline.yaml"))
