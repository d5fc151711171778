"""hfds/NAME: data sets of the Hugging Face package."""

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from architectures.hub import reached
from errors import DataError, OptionError, first_names
from pipeline.sources.base import (
    VAL_NAMES,
    Factory,
    PartOf,
    ReadOnce,
    Source,
    refuse_val_fraction,
)
from pipeline.sources.labels import class_names, each_once, label_texts, multi_hot, named

if TYPE_CHECKING:
    from config import DataOptions


class HuggingFaceSource(Source):
    """A Hugging Face data set with the columns ``image`` and ``label``, read by timm.

    A spawned worker opens a reader of its own; forked ones share it.

    With ``multilabel`` the column is ``labels`` or ``label``, a sequence of names, numbers or class
    labels in each row.
    """

    def __init__(
        self,
        name: str,
        root: str | None,
        split: str,
        *,
        multilabel: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        self.name, self.root, self.split = name, root, split
        self.column = ""  # of labels; empty: the reader's own
        self._open_reader()
        if multilabel:
            self._label(classes)
            return
        labels = self.reader.dataset[self.reader.label_key]
        self.targets = np.array(list(labels), dtype=np.int64)
        class_to_idx = self.reader.class_to_idx
        numbered = [str(label) for label in range(self.targets.max() + 1)]
        self.classes = sorted(class_to_idx, key=class_to_idx.get) or numbered

    def _label(self, classes: list[str] | None) -> None:
        """Set classes and targets from a column of sequences. Raises DataError for another one."""
        features = self.reader.dataset.features
        column = next((name for name in ("labels", "label") if name in features), None)
        kind = features.get(column)
        inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
        if column is None or inner is None:
            has = first_names(list(features))
            raise DataError(
                f"hfds/{self.name} has no sequence of labels as 'labels' or 'label'; its columns "
                f"are {has}"
            )
        self.column = self.reader.label_key = column
        rows = [list(row or ()) for row in self.reader.dataset[column]]
        names = getattr(inner, "names", None)
        if names:
            labels = [named(row, names, self.sample_id(index)) for index, row in enumerate(rows)]
            classes = list(names)
        else:
            labels = [each_once(label_texts(row)) for row in rows]
        self.classes = classes or class_names(sorted({name for row in labels for name in row}))
        self.targets = multi_hot(labels, self.classes, self.sample_id)

    def _open_reader(self) -> None:
        import_hugging_face()
        from timm.data.readers import create_reader

        self.reader = create_reader(f"hfds/{self.name}", root=self.root, split=self.split)
        if self.column:
            self.reader.label_key = self.column

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}

    def open(self, index: int) -> Any:
        if self.reader is None:
            self._open_reader()
        return self.reader[int(index)][0]

    def version(self) -> str:
        if self.reader is None:
            self._open_reader()
        return str(getattr(self.reader.dataset, "_fingerprint", ""))

    def sample_id(self, index: int) -> str:
        return f"hfds/{self.name} {self.split}#{index}"


def import_hugging_face() -> None:
    """Give the name ``datasets`` to Hugging Face's package, in this process and for good.

    This project's module of that name is there for users and plug-ins, and nothing inside the
    project imports it. Whoever imported it before keeps it.

    Raises ImportError, and changes nothing, where the package isn't installed.
    """
    root = Path(__file__).resolve().parents[2]
    loaded = sys.modules.get("datasets")
    if loaded is not None and Path(loaded.__file__ or "").resolve().parent != root:
        return
    sys.modules.pop("datasets", None)
    path = sys.path
    sys.path = [folder for folder in path if Path(folder or ".").resolve() != root]
    try:
        importlib.import_module("datasets")
    except ImportError:
        if loaded is not None:
            sys.modules["datasets"] = loaded
        raise
    finally:
        sys.path = path


def hugging_face_set(name: str) -> Factory:
    """The factory of the set ``name``; ``data_path`` is the package's cache folder."""

    def read(data: "DataOptions", seed: int) -> PartOf:
        refuse_val_fraction(data, "a Hugging Face set")

        @functools.cache
        def part(is_train: bool) -> Source:
            if is_train:
                return _first_split(name, ("train",), data)
            classes = part(True).classes if data.task == "multilabel" else None
            return _first_split(name, ("validation", *VAL_NAMES), data, classes)

        return part

    return ReadOnce(read)


def _first_split(
    name: str, splits: Sequence[str], data: "DataOptions", classes: list[str] | None = None
) -> Source:
    """The first of these splits that the set has. Raises OptionError and DataError."""
    root, multilabel = data.data_path or None, data.task == "multilabel"
    for split in dict.fromkeys(splits):
        try:
            with reached(f"hfds/{name}"):
                source = HuggingFaceSource(
                    name, root, split, multilabel=multilabel, classes=classes
                )
        except ImportError:
            raise OptionError("data_set", "hfds/ needs: pip install datasets") from None
        except ValueError as error:
            # What the package raises for an unknown split.
            problem = error
            continue
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"hfds/{name} can't be read: {error}") from None
        if not multilabel and source.targets.min() < 0:
            raise DataError(f"hfds/{name}: the split {split} has images without a label")
        return source
    raise DataError(f"hfds/{name} has none of the splits {', '.join(splits)}: {problem}")
