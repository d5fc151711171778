"""ImageNet's classes: ids and names in the order of published models."""

from collections import Counter

import pytest
import torchvision
from timm.data import ImageNetInfo

from pipeline import imagenet

SUBSETS = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k"}


@pytest.mark.parametrize("count", SUBSETS)
def test_ids_are_timms_and_names_distinct(count):
    info = ImageNetInfo(SUBSETS[count])
    assert list(imagenet.wordnet_ids(count)) == info.label_names()
    names = imagenet.class_names(count)
    assert len(set(names)) == count
    for i in range(0, count, 97):
        word = info.index_to_description(i).split(",")[0]
        assert names[i] in (word, f"{word} ({info.index_to_label_name(i)})")


def test_names_of_imagenet():
    names = imagenet.class_names(1000)
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet tissue")
    # Two classes have the first word "crane", two "maillot"; all others have their own.
    marked = {i: name for i, name in enumerate(names) if "(" in name}
    assert marked == {
        134: "crane (n02012849)",
        517: "crane (n03126707)",
        638: "maillot (n03710637)",
        639: "maillot (n03710721)",
    }
    first = Counter(text.split(",")[0] for text in ImageNetInfo().label_descriptions())
    assert [word for word, count in first.items() if count > 1] == ["crane", "maillot"]


def test_other_classes_are_not_imagenets():
    assert imagenet.wordnet_ids(10) is None and imagenet.class_names(10) is None
    names = list(imagenet.class_names(1000))
    assert imagenet.ids_of(names)[:2] == ["n01440764", "n01443537"]
    assert imagenet.ids_of(names[::-1]) is None
    assert imagenet.ids_of(["cat", "dog"]) is None


def test_names_of_other_libraries_are_imagenets():
    """torchvision's few own words make no difference; another order does."""
    categories = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    ids = ImageNetInfo().label_names()
    assert imagenet.ids_of(categories) == imagenet.ids_of(imagenet.class_names(1000)) == ids
    swapped = [categories[1], categories[0], *categories[2:]]
    assert imagenet.ids_of(swapped) is None
    assert imagenet.ids_of([f"kind {i}" for i in range(1000)]) is None


def test_classes_by_what_they_are_called():
    names = ["n01440764_tench", "Tinca tinca", "Great-White_Shark", "hen", "eft", "crane", "x"]
    assert imagenet.find(names, 1000) == [0, 0, 2, 8, 27, None, None]
    assert imagenet.find(["cardigan", "Cardigan"], 1000) == [474, 264]
    assert imagenet.find(["cardigan", "HEN"], 1000) == [None, 8]
    assert imagenet.find(["hen"], 10) == [None]
