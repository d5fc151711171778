"""What a source of images is, the ready-made ones, and what all kinds share."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import bounded
from errors import DataError, OptionError, os_error_text, shortened
from pipeline.sources.names import Names
from pipeline.sources.stratified import iterative_split

if TYPE_CHECKING:
    from config import DataOptions

MOST_JSON = 64 << 20  # bytes of a list of shards or classes
_ODD = 0x9E3779B97F4A7C15  # spreads a number over 64 bits
VAL_NAMES = ("val", "valid", "validation", "test")  # of the validation part


Target = int | np.ndarray
"""The label of an image, or (K,) uint8 of which labels it has."""


def as_targets(targets: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels as (N,) int64, or which labels each image has as (N, K) uint8."""
    targets = np.asarray(targets)
    return targets.astype(np.uint8 if targets.ndim == 2 else np.int64, copy=False)


def target_of(targets: np.ndarray, index: int) -> Target:
    """What ``Source.read`` gives of an image's labels."""
    return targets[index] if targets.ndim == 2 else int(targets[index])


class Source:
    """Images by number. A plug-in's data set is a subclass, or one of the ready-made ones below."""

    classes: list[str]
    """Names, in the order of the labels."""
    targets: np.ndarray | None
    """Label of each image, (N,) int64; None if it is only known when an image is read. Of
    ``--task multilabel`` (N, K) uint8: 1 where an image has a class, which may be none."""
    groups: np.ndarray | None = None
    """Number of the file that holds each image among others, (N,) int64; None: files of their own.
    """
    bytes_in_memory: int = 0
    """Of decoded images that are kept, see ``pipeline.memory``."""
    decoded: bool = False
    """Whether images come as uint8 or uint16 arrays without being decoded."""
    findings: Sequence[str] = ()
    """What the user should know of the files, a sentence each."""
    shareable: bool = False
    """Whether other processes of the machine may take it over, pickled, in place of making their
    own. Its arrays are shared then. A class says it for itself (:func:`may_be_shared`)."""

    def __len__(self) -> int:
        return len(self.targets)

    def open(self, index: int) -> Any:
        """What ``decode`` takes: a path, binary file, PIL image or uint8 array; of other forms
        than RGB what ``decode_bands`` takes."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[Any, Target]:
        """The image as of ``open``, and its label."""
        return self.open(index), target_of(self.targets, index)

    def sample_id(self, index: int) -> str:
        """What to call the image in a message."""
        raise NotImplementedError

    def identity(self, index: int) -> str:
        """What stays the image's name when the data set is moved."""
        return self.sample_id(index)

    def stamp(self, index: int) -> int:
        """A number below 2⁶⁴ that changes when the image's file does; 0 where it has none of its
        own. Raises OSError."""
        return 0

    def version(self) -> str:
        """What changes when files that hold many images do; empty where that isn't known."""
        return ""

    def kept(self) -> str:
        """Where decoded images are kept, in words; empty: nowhere."""
        return ""

    def news(self) -> Iterable[str]:
        """What has changed there since the last call, a sentence each."""
        return ()


def may_be_shared(source: Source) -> bool:
    """Whether the class of a source, not one that it is derived from, says ``shareable``.

    A plug-in's may need what its factory leaves in the process.
    """
    if not vars(type(source)).get("shareable"):
        return False
    return not isinstance(source, Subset) or may_be_shared(source.source)


class FileSource(Source):
    """Image files below ``root``."""

    shareable = True

    def __init__(
        self, root: Path, paths: Sequence[str] | Names, targets: Sequence[int], classes: list[str]
    ) -> None:
        self.root = root
        named = isinstance(paths, Names)
        self.paths = paths if named else Names([os.fsencode(path) for path in paths])
        self.targets = as_targets(targets)
        self.classes = classes

    def open(self, index: int) -> str:
        return self.sample_id(index)

    def stamp(self, index: int) -> int:
        status = os.stat(self.sample_id(index))
        return (status.st_mtime_ns * _ODD + status.st_size) % 2**64

    def sample_id(self, index: int) -> str:
        return os.path.join(self.root, self.identity(index))

    def identity(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class ArraySource(Source):
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3)."""

    shareable = True

    decoded = True

    def __init__(
        self, images: np.ndarray, targets: Sequence[int], classes: list[str], name: str
    ) -> None:
        self.images = images
        self.targets = as_targets(targets)
        self.classes = classes
        self.name = name

    def open(self, index: int) -> np.ndarray:
        return self.images[index]

    def sample_id(self, index: int) -> str:
        return f"{self.name}#{index}"


class Subset(Source):
    """Some images of another source, in the order of ``indices``."""

    shareable = True

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.classes = source.classes
        self.targets = None if source.targets is None else source.targets[self.indices]
        self.findings = source.findings

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Any:
        return self.source.open(self.indices[index])

    def read(self, index: int) -> tuple[Any, Target]:
        return self.source.read(self.indices[index])

    def sample_id(self, index: int) -> str:
        return self.source.sample_id(self.indices[index])

    def identity(self, index: int) -> str:
        return self.source.identity(self.indices[index])


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation, each sorted.

    ``fraction`` of every class is held out, rounded, but a class of two or more has at least one
    image on either side. A class of one goes to training.
    """
    labels = np.asarray(labels)
    rng = np.random.RandomState(seed % 2**32)  # its stream, unlike Generator's, is fixed for good
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held_out[members[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class Drawn(Subset):
    """One part of a source of which a share is held out for validation."""

    shareable = True

    def __init__(self, source: Source, indices: Sequence[int], *, is_train: bool) -> None:
        super().__init__(source, indices)
        self.is_train = is_train

    def other_part(self) -> "Drawn":
        """The images of the source that are not in this part."""
        rest = np.delete(np.arange(len(self.source)), self.indices)
        return Drawn(self.source, rest, is_train=not self.is_train)

    def as_held_out(self, numbers: np.ndarray) -> "Drawn":
        """This part where the images of these :func:`image_numbers` are what is held out.

        The part stays as it was drawn if none of them is here.
        """
        if self.is_train:
            drawn = np.delete(image_numbers(self.source), self.indices)
        else:
            drawn = image_numbers(self)
        # The same draw: of an image that is listed twice, one may be on either side.
        if np.array_equal(np.sort(drawn), np.sort(numbers)):
            return self
        out = np.isin(image_numbers(self.source), numbers)
        if not out.any():
            return self
        return Drawn(self.source, np.flatnonzero(out != self.is_train), is_train=self.is_train)


def image_numbers(source: Source) -> np.ndarray:
    """A number for each image that follows from its identity alone, (N,) int64."""
    names = (source.identity(index) for index in range(len(source)))
    hashes = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64)


def held_out(source: Source, is_train: bool, fraction: float, seed: int) -> Drawn:
    """The part of ``source`` for training, or the ``fraction`` that is held out for validation."""
    split = stratified_split if source.targets.ndim == 1 else iterative_split
    indices = split(source.targets, fraction, seed)[0 if is_train else 1]
    return Drawn(source, indices, is_train=is_train)


def refuse_val_fraction(data: "DataOptions", what: str) -> None:
    """Raise OptionError if ``what`` is to be split though it has a validation part."""
    if data.val_fraction is not None:
        raise OptionError("val_fraction", f"{what} has its own validation part: leave it out")


def data_root(data: "DataOptions") -> Path:
    """``data_path``, which must exist. Raises OptionError."""
    if not data.data_path:
        raise OptionError("data_path", f"{data.data_set} needs the folder of the data set")
    root = Path(os.path.expanduser(data.data_path))
    try:
        if not root.exists():
            raise OptionError("data_path", f"{root} does not exist")
    except OSError as error:
        raise OptionError("data_path", os_error_text(error, root)) from None
    return root


def first_existing(paths: Iterable[Path]) -> Path | None:
    """The first of ``paths`` that is there."""
    return next((path for path in paths if path.exists()), None)


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """What a JSON file of ``most`` bytes or fewer holds.

    Raises OptionError if it is missing, DataError if it is damaged or longer.
    """
    try:
        return bounded.read_json(path, most)
    except FileNotFoundError:
        raise OptionError("data_path", f"{path} does not exist") from None
    except OSError as error:
        raise DataError(os_error_text(error, path)) from None
    except ValueError as error:
        raise DataError(f"{path} can't be read: {shortened(str(error))}") from None


# (is_train, data options, seed) to one part of a data set.
Factory = Callable[[bool, "DataOptions", int], Source]
PartOf = Callable[[bool], Source]
"""is_train to a part of a data set whose lists are read."""


@dataclass(frozen=True)
class ReadOnce:
    """The factory of a set of which one reading of the lists gives both parts."""

    read: Callable[["DataOptions", int], PartOf]
    """Data options and seed to what gives the parts."""

    def __call__(self, is_train: bool, data: "DataOptions", seed: int) -> Source:
        return self.read(data, seed)(is_train)
