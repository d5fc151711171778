"""The classes of ImageNet and its larger sets, as models with published weights know them."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

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


def find(names: Sequence[str], num_classes: int) -> list[int | None]:
    """Which of a model's ``num_classes`` classes each of ``names`` is, where it says so.

    It may be a WordNet id, or begin with one ("n01440764_tench"), or be English: the name by
    :func:`class_names`, all words of WordNet ("tench, Tinca tinca"), or one of them that no other
    class has. Capitals, "_" and "-" make no difference, unless all are spelled as by
    :func:`class_names`, which has "Cardigan", a dog, and "cardigan". Else None.
    """
    ids = {id_: index for index, id_ in enumerate(wordnet_ids(num_classes) or ())}
    exact = {name: index for index, name in enumerate(class_names(num_classes) or ())}
    if exact.keys() >= set(names):
        return [exact[name] for name in names]
    words = _words(num_classes)
    found = []
    for name in names:
        begin = _ID.match(name)
        found.append(ids.get(begin[0]) if begin else words.get(_plain(name)))
    return found


_ID = re.compile(r"n\d{8}(?![0-9A-Za-z])")


@functools.cache
def _words(num_classes: int) -> Mapping[str, int]:
    """The class that each English name means, by :func:`_plain`, where it means one."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return {}
    described = ImageNetInfo(subset).label_descriptions()
    names = class_names(num_classes)
    synonyms = [(i, word) for i, text in enumerate(described) for word in text.split(",")]
    found: dict[str, int] = {}
    # What a class is called here goes before what others are called too.
    for pairs in (enumerate(names), enumerate(described), synonyms):
        new: dict[str, set[int]] = {}
        for index, word in pairs:
            new.setdefault(_plain(word), set()).add(index)
        found |= {word: min(of) if len(of) == 1 else -1 for word, of in new.items()} | found
    return {word: index for word, index in found.items() if index >= 0}


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def ids_of(names: Sequence[str]) -> list[str] | None:
    """The WordNet ids of a model's classes whose ``names`` are ImageNet's, in its order; else None.

    Nine in ten must say so, by :func:`find`: torchvision and transformers call a few otherwise.
    """
    ids, places = wordnet_ids(len(names)), range(len(names))
    if ids is None:
        return None
    found = find(names, len(names))
    if any(place not in (None, i) for i, place in zip(places, found, strict=True)):
        return None
    return list(ids) if found.count(None) <= len(names) / 10 else None
