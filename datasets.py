"""Data sets: what users and plug-ins import; ``pipeline`` and ``augmentation`` hold the code.

A data set is a ``Source`` (images by number, labels, class names) wrapped in an ``ImageDataset``,
which decodes, augments and copes with unreadable images; a ``Loader`` makes batches of it. All
sources have random access, the sharded ones too, so that sampling, exact evaluation and resuming in
mid-epoch work alike on all.

Nothing inside the project imports this module: its name is also that of Hugging Face's package.
"""

from typing import Any

from augmentation.own import register_transform
from augmentation.protocol import Transform
from augmentation.transforms import build_transform
from pipeline.dataset import Batch, ImageDataset, build_dataset
from pipeline.decoding import BadImageError, decode
from pipeline.loader import Loader, LoaderSettings
from pipeline.sources.base import ArraySource, FileSource, Source, Subset, stratified_split
from pipeline.sources.idx import read_idx
from pipeline.sources.inaturalist import INatDataset
from pipeline.sources.registry import register_dataset


def __getattr__(name: str) -> Any:
    """Who looks for Hugging Face's package here is told where it is."""
    raise AttributeError(
        f"{__file__} has no {name}: if Hugging Face's package is meant, import it before this "
        "project's folder is put on sys.path, or put the folder at the end of it"
    )


__all__ = [
    "ArraySource",
    "BadImageError",
    "Batch",
    "FileSource",
    "INatDataset",
    "ImageDataset",
    "Loader",
    "LoaderSettings",
    "Source",
    "Subset",
    "Transform",
    "build_dataset",
    "build_transform",
    "decode",
    "read_idx",
    "register_dataset",
    "register_transform",
    "stratified_split",
]
