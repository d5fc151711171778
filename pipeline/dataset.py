"""The data set: a source with its transform, and batches of it."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from augmentation.protocol import RGB, Plan, Transform
from errors import DataError, OptionError, first_names, printable
from pipeline.bands import decode_bands
from pipeline.class_lists import check_same_classes, missing_classes, unlearnt_labels
from pipeline.decoding import (
    DECODERS,
    lacks_file_handles,
    naming_lack_of_memory,
    open_parts,
)
from pipeline.limits import BadImageError, limit_pixels, most_pixels
from pipeline.sources.base import Drawn, Source, Subset, Target, image_numbers
from pipeline.sources.registry import open_both, open_source
from pipeline.workers import WorkerProgress
from samplers import SampleKey

if TYPE_CHECKING:
    from config import DataOptions

FEW_CLASSES = 20  # each is named with its count
IMBALANCE = 10  # a most frequent class this many times the least frequent one is worth a warning


class Batch(NamedTuple):
    """A batch on the host. ``images`` is (0, 3, 0, 0) where every image of it was left out."""

    images: torch.Tensor
    """(B, C, H, W): float32, normalised; or uint8 or uint16, with what is left to do in ``plan``.
    Of training with S augmentation splits (S × B, C, H, W), all clean images first, unless the plan
    has that."""
    targets: torch.Tensor
    """(B,) int64; of ``--task multilabel`` (B, K) float32, 1 where an image has a label. (0,) where
    every image was left out."""
    indices: torch.Tensor
    """(B,) int64, indices of the data set."""
    positions: torch.Tensor
    """(B,) int64, places in the epoch's global sequence."""
    bad: list[str]
    """"path: reason" of each image that couldn't be read."""
    plan: Plan | None = None
    """How to augment uint8 images; None: not at all."""


class Sample(NamedTuple):
    """An image of a batch."""

    image: torch.Tensor | None
    """(C, H, W), or None where it couldn't be read and has no replacement."""
    target: Target
    index: int
    epoch: int
    position: int
    bad: list[str]


class ImageDataset(torch.utils.data.Dataset[Sample]):
    """A source with its transform. ``dataset[SampleKey]`` is a function of the key alone.

    With ``on_bad_image`` "skip" an unreadable image is replaced in training, by the next readable
    one, and left out in evaluation. With "error" it is left out here, and the loader raises.
    """

    MOST_REPLACEMENTS = 100

    def __init__(
        self,
        source: Source,
        transform: Transform | None = None,
        *,
        is_train: bool = False,
        on_bad_image: str = "error",
    ) -> None:
        self.source = source
        self.transform = transform
        self.is_train = is_train
        self.on_bad_image = on_bad_image
        self.given_up: dict[int, str] = {}  # images not to be tried again, and why
        self.progress = WorkerProgress(0)

    def __getstate__(self) -> dict[str, Any]:
        # Workers that aren't forked learn of the process's limit by this.
        return {**self.__dict__, "most_pixels": most_pixels()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        limit_pixels(state.pop("most_pixels"))
        self.__dict__ |= state

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def targets(self) -> np.ndarray | None:
        """As of ``Source.targets``: None where a label is only known when its image is read."""
        return self.source.targets

    @property
    def held_out(self) -> torch.Tensor | None:
        """Numbers of the images of a validation part that was drawn, (N,) int64; None for others.

        Each follows from the path of its image within the data set.
        """
        drawn = isinstance(self.source, Drawn) and not self.source.is_train
        return torch.from_numpy(image_numbers(self.source)) if drawn else None

    def __len__(self) -> int:
        return len(self.source)

    def sample_id(self, index: int) -> str:
        """The path of an image, or what else it is called, as a terminal can show it."""
        return printable(self.source.sample_id(index))

    def with_transform(self, transform: Transform) -> "ImageDataset":
        """The same images through another transform."""
        return self._changed(transform=transform)

    def with_source(self, source: Source) -> "ImageDataset":
        """The images of another source, treated alike."""
        return self._changed(source=source)

    def subset(self, indices: Sequence[int]) -> "ImageDataset":
        """The images of ``indices`` alone, renumbered."""
        return self.with_source(Subset(self.source, indices))

    def watched_by(self, progress: WorkerProgress) -> "ImageDataset":
        """The same data set, whose workers note in ``progress`` what they are at."""
        watched = copy.copy(self)
        watched.progress = progress
        return watched

    def _changed(self, **changes: Any) -> "ImageDataset":
        parts = {"source": self.source, "transform": self.transform, "is_train": self.is_train}
        return ImageDataset(**{**parts, "on_bad_image": self.on_bad_image, **changes})

    def __getitem__(self, key: SampleKey | int) -> Sample:
        if not isinstance(key, SampleKey):
            key = SampleKey(int(key), 0, int(key))
        bad: list[str] = []
        replace = self.is_train and self.on_bad_image == "skip"
        for step in range(min(len(self), self.MOST_REPLACEMENTS) if replace else 1):
            index = (key.index + step) % len(self)
            if index in self.given_up:
                bad.append(f"{self.sample_id(index)}: {self.given_up[index]}")
                continue
            self.progress.begin(index)
            try:
                encoded, target = self.source.read(index)
                image = opened(encoded, self.transform)
                with naming_lack_of_memory():
                    tensor = self.transform.apply(image, key.epoch, key.position)
            except (BadImageError, OSError) as error:
                if lacks_file_handles(error):
                    raise
                bad.append(f"{self.sample_id(index)}: {error}")
                continue
            finally:
                self.progress.end()
            return Sample(tensor, target, index, key.epoch, key.position, bad)
        return Sample(None, -1, key.index, key.epoch, key.position, bad)

    def plan(self, epoch: int, positions: np.ndarray) -> Plan | None:
        """What is left to do with the images at these positions; None: at most to normalise."""
        return self.transform.plan(epoch, positions)


def opened(encoded: Any, transform: Transform) -> Any:
    """What a source has read of an image, as ``transform.apply`` takes it.

    Raises BadImageError, and OSError as ``pipeline.decoding.decode`` does.
    """
    if transform.form != RGB:
        return decode_bands(encoded, transform.form, transform.background)
    if transform.takes_parts:
        return open_parts(encoded, transform.background, transform.decode_as)
    return DECODERS[transform.decode_as](encoded, transform.background)


def build_dataset(
    is_train: bool,
    data: "DataOptions",
    *,
    seed: int,
    classes: list[str] | None = None,
    held_out: torch.Tensor | None = None,
) -> ImageDataset:
    """The training or validation part of ``data.data_set``, which has no transform yet.

    From here on this process and its workers read no larger images than ``data.max_image_pixels``.

    Args:
        is_train: which part.
        data: where the images are and how they are split.
        seed: decides what ``val_fraction`` holds out.
        classes: those of a trained model, with which a validation part may stand alone; else they
            are those of the training part.
        held_out: numbers of the images that a run validates on
            (:attr:`ImageDataset.held_out`); if any of them is here, they are what is held out
            in place of what ``seed`` would draw.

    Raises:
        OptionError: the options ask for what can't be had.
        DataError: something is wrong with the files.
    """
    limit_pixels(data.max_image_pixels)
    source = open_source(is_train, data, seed=seed, classes=classes)
    return _dataset(_as_held_out(source, held_out), is_train, data)


def build_parts(
    data: "DataOptions",
    *,
    seed: int,
    held_out: torch.Tensor | None = None,
    same_classes: bool = True,
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation part, as :func:`build_dataset` gives each.

    Lists that say what both parts hold are read once for both. Raises DataError as well for a
    validation part with classes that the training part lacks, unless ``same_classes`` is False.
    """
    limit_pixels(data.max_image_pixels)
    part = open_both(data, seed=seed)
    train = _dataset(_as_held_out(part(True), held_out), True, data)
    if isinstance(train.source, Drawn):
        return train, _dataset(train.source.other_part(), False, data)
    val = _dataset(part(False), False, data)
    if same_classes:
        check_same_classes(data.data_set, train.source, val.source)
    val.source.findings = (*val.source.findings, *unlearnt_labels(train.source, val.source))
    return train, val


def _as_held_out(source: Source, numbers: torch.Tensor | None) -> Source:
    """A source of which a share is held out, with these images held out."""
    if numbers is None or not isinstance(source, Drawn):
        return source
    return source.as_held_out(numbers.numpy())


def _dataset(source: Source, is_train: bool, data: "DataOptions") -> ImageDataset:
    if not len(source):
        why = "".join(f"; {text}" for text in source.findings)
        raise DataError(
            f"{data.data_set}: the {'training' if is_train else 'validation'} part is empty{why}"
        )
    if not is_train:
        source.findings = (*source.findings, *missing_classes(source))
    _check_task(source, data)
    return ImageDataset(source, is_train=is_train, on_bad_image=data.on_bad_image)


def _check_task(source: Source, data: "DataOptions") -> None:
    """Raise OptionError if the labels of a source are those of another ``--task``."""
    several = source.targets is not None and source.targets.ndim == 2
    if several and data.task != "multilabel":
        raise OptionError(
            "task", f"{data.data_set} gives images any number of labels: add --task multilabel"
        )
    if data.task == "multilabel" and not several:
        raise OptionError("task", f"{data.data_set} gives each image one label: leave it out")


def findings(*parts: ImageDataset) -> list[str]:
    """What the user should know of the files of these parts, each sentence once."""
    texts = (printable(text) for part in parts for text in part.source.findings)
    return list(dict.fromkeys(texts))


def summarise_classes(dataset: ImageDataset) -> tuple[np.ndarray, list[str]]:
    """Images per class, (C,) int64, and lines to log; one that warns starts with "warning:"."""
    if dataset.targets is None:
        return np.zeros(0, dtype=np.int64), ["images per class: unknown before they are read"]
    several = dataset.targets.ndim == 2
    if several:
        counts = dataset.targets.sum(0, dtype=np.int64)
    else:
        counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    least, most = counts.argmin(), counts.argmax()
    if len(counts) <= FEW_CLASSES:
        each = zip(dataset.classes, counts, strict=True)
        lines = ["images per class: " + ", ".join(f"{name} {count}" for name, count in each)]
    else:
        lines = [
            f"images per class: {counts[least]} ({dataset.classes[least]}) to {counts[most]} "
            f"({dataset.classes[most]})"
        ]
    empty = [dataset.classes[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        lines.append(f"warning: no images of {len(empty)} classes: {first_names(empty)}")
    present = counts[counts > 0]
    if several:
        return counts, [_labels_per_image(dataset.targets), *lines]
    if present.max() >= IMBALANCE * present.min():
        lines.append(
            f"warning: the most frequent class has {present.max() / present.min():.0f} times the "
            "images of the least frequent: see --sampler balanced and --class-weights balanced"
        )
    return counts, lines


def _labels_per_image(targets: np.ndarray) -> str:
    """A line of how many labels (N, K) images have."""
    each = targets.sum(1, dtype=np.int64)
    return (
        f"labels per image: {each.mean():.2f} on average, {each.max()} at most; "
        f"{(each == 0).sum()} images have none"
    )


def collate(
    samples: list[Sample],
    plan: Callable[[int, np.ndarray], Plan | None] = lambda epoch, positions: None,
) -> Batch:
    """The readable samples as a batch, with the names of the unreadable ones, and their plan."""
    good = [sample for sample in samples if sample.image is not None]
    columns = ([s.index for s in good], [s.position for s in good])
    return Batch(
        _images([s.image for s in good]) if good else torch.empty(0, 3, 0, 0),
        _targets([s.target for s in good]),
        *(torch.tensor(column, dtype=torch.int64) for column in columns),
        [line for sample in samples for line in sample.bad],
        plan(good[0].epoch, np.array(columns[1])) if good else None,
    )


def _images(images: list[torch.Tensor]) -> torch.Tensor:
    """(B, C, H, W), or of images in S splits (S × B, C, H, W): all of the first, then the next.

    Where all images lie colour by colour within each pixel, as they are decoded and resized, the
    batch does so too. Planes are made of it where it is flipped or normalised.
    """
    if all(image.ndim == 3 and image.stride(0) == 1 < len(image) for image in images):
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    batch = torch.stack(images)
    return batch.transpose(0, 1).flatten(0, 1) if batch.ndim == 5 else batch


def _targets(targets: list[Target]) -> torch.Tensor:
    """(B,) int64, or (B, K) float32."""
    if targets and isinstance(targets[0], np.ndarray):
        return torch.from_numpy(np.stack(targets)).float()
    return torch.tensor(targets, dtype=torch.int64)
