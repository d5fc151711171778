"""Data sets by name: the table of all kinds, and the way to add one."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from errors import OptionError, did_you_mean
from pipeline.sources.base import Factory, PartOf, ReadOnce, Source
from pipeline.sources.cifar import cifar
from pipeline.sources.csv_files import csv_classes, csv_set, csv_validation_part
from pipeline.sources.digits import digits
from pipeline.sources.folders import folder_classes, folder_validation_part, image_folder
from pipeline.sources.hugging_face import hugging_face_set
from pipeline.sources.idx import idx
from pipeline.sources.inaturalist import inat
from pipeline.sources.raw import raw_images
from pipeline.sources.shards import webdataset
from pipeline.sources.tensorflow import tensorflow_set

if TYPE_CHECKING:
    from config import DataOptions

# --data-set NAME, in capitals.
FACTORIES: dict[str, Factory] = {
    "IMNET": image_folder,
    "CIFAR": cifar("CIFAR100"),
    "CIFAR10": cifar("CIFAR10"),
    "CIFAR100": cifar("CIFAR100"),
    "MNIST": idx("MNIST"),
    "FMNIST": idx("FashionMNIST"),
    "INAT": inat(2018),
    "INAT19": inat(2019),
    "CSV": ReadOnce(csv_set),
    "DIGITS": digits,
}

# --data-set PREFIX/NAME: what makes the factory of a name.
PREFIXES: dict[str, Callable[[str], Factory]] = {
    "wds": webdataset,
    "hfds": hugging_face_set,
    "tfds": tensorflow_set,
    "raw": raw_images,
}

# Validation parts without a training part, for a model that knows its classes.
VALIDATION_PARTS: dict[str, Callable[["DataOptions", list[str]], Source | None]] = {
    "IMNET": folder_validation_part,
    "CSV": csv_validation_part,
}

# Their own classes, for a model that doesn't know its classes by name.
_VALIDATION_CLASSES: dict[str, Callable[["DataOptions"], list[str] | None]] = {
    "IMNET": folder_classes,
    "CSV": csv_classes,
}

# Mean and std of the training images.
_NORMALIZATION = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST": ((0.1307,) * 3, (0.3081,) * 3),
    "FMNIST": ((0.2860,) * 3, (0.3530,) * 3),
    "DIGITS": ((0.3053,) * 3, (0.3759,) * 3),
}


def register_dataset(name: str) -> Callable[[Factory], Factory]:
    """Decorator for plug-ins: ``factory(is_train, data_options, seed) -> Source`` as a data set.

    Both parts must have the same class list.
    """

    def register(factory: Factory) -> Factory:
        FACTORIES[name.upper()] = factory
        return factory

    return register


def open_source(
    is_train: bool, data: "DataOptions", *, seed: int, classes: list[str] | None = None
) -> Source:
    """The images of one part of ``data.data_set``; see ``pipeline.dataset.build_dataset``."""
    factory, known = _factory(data), data.data_set.upper()
    if classes is not None and not is_train and known in VALIDATION_PARTS:
        source = VALIDATION_PARTS[known](data, list(classes))
        if source is not None:
            return source
    return factory(is_train, data, seed)


def open_both(data: "DataOptions", *, seed: int) -> PartOf:
    """What gives the images of each part; lists that say what both parts hold are read once."""
    factory = _factory(data)
    if isinstance(factory, ReadOnce):
        return factory.read(data, seed)
    return lambda is_train: factory(is_train, data, seed)


def _factory(data: "DataOptions") -> Factory:
    """Raises OptionError for an unknown set."""
    prefix, slash, name = data.data_set.partition("/")
    if slash and prefix.lower() in PREFIXES:
        return PREFIXES[prefix.lower()](name)
    known = data.data_set.upper()
    if known not in FACTORIES:
        names = [*FACTORIES, *(f"{prefix}/NAME" for prefix in PREFIXES)]
        hint = did_you_mean(known, FACTORIES, otherwise=f"one of {', '.join(names)}")
        raise OptionError("data_set", f"unknown data set {data.data_set!r}; {hint}")
    return FACTORIES[known]


def validation_classes(data: "DataOptions") -> list[str] | None:
    """Class names of a validation part that stands alone, as its files have them; None for other
    sets, whose classes are those of the training part."""
    find = _VALIDATION_CLASSES.get(data.data_set.upper())
    return find(data) if find else None


def default_normalization(data_set: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of the training images of a small set, three values each; None for others."""
    name = data_set.upper()
    return _NORMALIZATION.get("CIFAR100" if name == "CIFAR" else name)
