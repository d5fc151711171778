"""tfds/NAME: sets of tensorflow-datasets."""

import functools
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from errors import DataError, OptionError, first_names
from pipeline.sources.base import Factory, Source, Target, refuse_val_fraction, target_of
from pipeline.sources.labels import multi_hot, named

if TYPE_CHECKING:
    from config import DataOptions


class TensorFlowSource(Source):
    """A set of tensorflow-datasets, as its random access data source (needs array_record files).

    With ``multilabel`` the feature is ``labels`` or ``label``, a sequence of class labels in each
    record; all records are read for them. Raises DataError for another feature.
    """

    targets = None

    def __init__(
        self, name: str, root: str | None, split: str, download: bool, *, multilabel: bool = False
    ) -> None:
        import tensorflow_datasets as tfds

        self.name, self.split = name, split
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if download:
            builder.download_and_prepare()
        skip = {"image": tfds.decode.SkipDecoding()}  # bytes: decoded here, like all others
        self.records = builder.as_data_source(split=split, decoders=skip)
        features = builder.info.features
        self.column = _sequence(name, features) if multilabel else "label"
        kind = features[self.column].feature if multilabel else features[self.column]
        self.classes = list(kind.names)
        if multilabel:
            numbers = (self.records[index][self.column] for index in range(len(self.records)))
            labels = [
                named(each, self.classes, self.sample_id(index))
                for index, each in enumerate(numbers)
            ]
            self.targets = multi_hot(labels, self.classes, self.sample_id)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[io.BytesIO, Target]:
        record = self.records[int(index)]
        label = record[self.column] if self.targets is None else target_of(self.targets, index)
        return io.BytesIO(record["image"]), int(label) if self.targets is None else label

    def sample_id(self, index: int) -> str:
        return f"tfds/{self.name} {self.split}#{index}"


def _sequence(name: str, features: Mapping[str, Any]) -> str:
    """The feature that is a sequence of class labels. Raises DataError where there is none."""
    for column in ("labels", "label"):
        if column in features and getattr(getattr(features[column], "feature", None), "names", ()):
            return column
    raise DataError(
        f"tfds/{name} has no sequence of class labels as 'labels' or 'label'; its features are "
        f"{first_names(list(features))}"
    )


def tensorflow_set(name: str) -> Factory:
    """The factory of the set ``name``; ``data_path`` is where it was prepared."""
    return functools.partial(_first_split, name)


def _first_split(name: str, is_train: bool, data: "DataOptions", seed: int) -> Source:
    refuse_val_fraction(data, "a tensorflow-datasets set")
    root = data.data_path or None
    splits = ("train",) if is_train else ("validation", "test")
    problem: Exception | None = None
    for split in splits:
        try:
            return TensorFlowSource(
                name, root, split, data.download, multilabel=data.task == "multilabel"
            )
        except ImportError as error:
            raise OptionError(
                "data_set",
                "tfds/ needs: pip install tensorflow-datasets array_record, and tensorflow for "
                f"--download ({error})",
            ) from None
        except (OSError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            problem = error
    raise DataError(
        f"tfds/{name} can't be read: {problem} (it must be prepared as array_record; "
        "--download does so)"
    )
