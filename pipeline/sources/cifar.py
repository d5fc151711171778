"""CIFAR10 and CIFAR100, in torchvision's files."""

from typing import TYPE_CHECKING

from pipeline.sources.base import ArraySource, Factory, Source, refuse_val_fraction
from pipeline.sources.download import download_root, fetch

if TYPE_CHECKING:
    from config import DataOptions


def cifar(name: str) -> Factory:
    """The factory of CIFAR10 or CIFAR100."""

    def factory(is_train: bool, data: "DataOptions", seed: int) -> Source:
        from torchvision import datasets as torchvision_datasets

        refuse_val_fraction(data, name)
        root = download_root(data)
        kind = getattr(torchvision_datasets, name)
        if root.name == kind.base_folder:
            root = root.parent
        dataset = fetch(lambda: kind(root, train=is_train, download=data.download), name, data)
        part = f"{name} {'train' if is_train else 'test'}"
        return ArraySource(dataset.data, dataset.targets, dataset.classes, part)

    return factory
