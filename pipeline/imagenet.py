"""The classes of ImageNet and its larger sets, as models with published weights know them."""

import functools
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset


@functools.cache
def wordnet_ids(num_classes: int) -> tuple[str, ...] | None:
    """The WordNet ids ("n01440764") of a model's classes, in order; ImageNet's folders have these
    names.

    The number of classes tells the set, as in timm: 1000, and those of ImageNet-12k, -21k and -22k.
    None for any other number.
    """
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


@functools.cache
def class_names(num_classes: int) -> tuple[str, ...] | None:
    """The names of a model's classes, in order: WordNet's first word for each, "tench".

    Where several classes share it, their ids tell them apart: "crane (n02012849)". None as above.
    """
    ids = wordnet_ids(num_classes)
    if ids is None:
        return None
    described = ImageNetInfo(infer_imagenet_subset({"num_classes": num_classes}))
    words = [text.partition(",")[0] for text in described.label_descriptions()]
    count = Counter(words)
    return tuple(
        word if count[word] == 1 else f"{word} ({id_})"
        for word, id_ in zip(words, ids, strict=True)
    )


def ids_of(names: Sequence[str]) -> list[str] | None:
    """The WordNet ids of classes that have ``names``, as :func:`class_names` says; else None."""
    return list(wordnet_ids(len(names))) if tuple(names) == class_names(len(names)) else None
