"""tfds/NAME: sets of tensorflow-datasets."""

import io
from typing import TYPE_CHECKING

from errors import DataError, OptionError
from pipeline.sources.base import Source, refuse_val_fraction

if TYPE_CHECKING:
    from config import DataOptions


class TensorFlowSource(Source):
    """A set of tensorflow-datasets, as its random access data source (needs array_record files)."""

    targets = None

    def __init__(self, name: str, root: str | None, split: str, download: bool) -> None:
        import tensorflow_datasets as tfds

        self.name, self.split = name, split
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if download:
            builder.download_and_prepare()
        skip = {"image": tfds.decode.SkipDecoding()}  # bytes: decoded here, like all others
        self.records = builder.as_data_source(split=split, decoders=skip)
        self.classes = list(builder.info.features["label"].names)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[io.BytesIO, int]:
        record = self.records[int(index)]
        return io.BytesIO(record["image"]), int(record["label"])

    def sample_id(self, index: int) -> str:
        return f"tfds/{self.name} {self.split}#{index}"


def tensorflow_set(name: str, is_train: bool, data: "DataOptions") -> Source:
    """A part of the set ``name``; ``data_path`` is where it was prepared."""
    refuse_val_fraction(data, "a tensorflow-datasets set")
    root = data.data_path or None
    splits = ("train",) if is_train else ("validation", "test")
    problem: Exception | None = None
    for split in splits:
        try:
            return TensorFlowSource(name, root, split, data.download)
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
