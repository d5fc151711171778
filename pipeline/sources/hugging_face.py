"""hfds/NAME: data sets of the Hugging Face package."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from architectures.hub import reached
from errors import DataError, OptionError
from pipeline.sources.base import VAL_NAMES, Source, refuse_val_fraction

if TYPE_CHECKING:
    from config import DataOptions


class HuggingFaceSource(Source):
    """A Hugging Face data set with the columns ``image`` and ``label``, read by timm.

    A spawned worker opens a reader of its own; forked ones share it.
    """

    def __init__(self, name: str, root: str | None, split: str) -> None:
        self.name, self.root, self.split = name, root, split
        self._open_reader()
        labels = self.reader.dataset[self.reader.label_key]
        self.targets = np.array(list(labels), dtype=np.int64)
        class_to_idx = self.reader.class_to_idx
        numbered = [str(label) for label in range(self.targets.max() + 1)]
        self.classes = sorted(class_to_idx, key=class_to_idx.get) or numbered

    def _open_reader(self) -> None:
        import_hugging_face()
        from timm.data.readers import create_reader

        self.reader = create_reader(f"hfds/{self.name}", root=self.root, split=self.split)

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


def hugging_face_set(name: str, is_train: bool, data: "DataOptions") -> Source:
    """A part of the set ``name``; ``data_path`` is the package's cache folder."""
    refuse_val_fraction(data, "a Hugging Face set")
    root = data.data_path or None
    splits = ("train",) if is_train else ("validation", *VAL_NAMES)
    for split in dict.fromkeys(splits):
        try:
            with reached(f"hfds/{name}"):
                source = HuggingFaceSource(name, root, split)
        except ImportError:
            raise OptionError("data_set", "hfds/ needs: pip install datasets") from None
        except ValueError as error:
            # What the package raises for an unknown split.
            problem = error
            continue
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"hfds/{name} can't be read: {error}") from None
        if source.targets.min() < 0:
            raise DataError(f"hfds/{name}: the split {split} has images without a label")
        return source
    raise DataError(f"hfds/{name} has none of the splits {', '.join(splits)}: {problem}")
