"""How the classes of a validation set are classes of the model that is evaluated.

ImageNet's variants have 1000 classes in another order, or some of them, or several right ones; a
model's outputs are compared with them as timm's ``validate.py`` does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import DataOptions
from errors import DataError, OptionError, did_you_mean, first_names
from inference import unnamed
from optimization.counts import NO_OUTPUT, PADDING
from optimization.multilabel import Result
from pipeline import imagenet
from pipeline.dataset import ImageDataset
from training.label_files import read_class_map, read_real_labels, read_valid_labels

_WORDNET = re.compile(r"n\d{8}")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


@dataclass(frozen=True)
class ModelClasses:
    """What is known of the classes of a model."""

    option: str
    """The option that says where the weights are from."""
    source: str
    """What to call them in a message."""
    count: int
    """Number of outputs."""
    names: Sequence[str] | None = None
    """Of the outputs, in order; None: unknown."""
    imagenet: bool = False
    """Whether the names are ImageNet's wordnet ids, by the number of outputs."""
    certain: bool = False
    """Whether the names came with the weights: they aren't concluded from the number alone."""

    @classmethod
    def of(
        cls, option: str, source: str, count: int, names: Sequence[str] | None = None
    ) -> "ModelClasses":
        """Of ``count`` outputs whose ``names`` came with the weights, or did not.

        Names that several outputs have tell nothing, nor do those that are made up.
        """
        made_up = names is not None and list(names) == unnamed(count)
        if made_up or (names is not None and len(set(names)) < len(names)):
            names = None
        ids = imagenet.wordnet_ids(count) if names is None else imagenet.ids_of(names)
        certain = names is not None
        return cls(option, source, count, names if ids is None else ids, ids is not None, certain)

    def find(self, word: str) -> int:
        """The class that ``word`` means, an index or a name. Raises ValueError if there is none."""
        if re.fullmatch(r"-?\d+", word):
            if not 0 <= int(word) < self.count:
                raise ValueError(f"the model has no class {word}, but 0 to {self.count - 1}")
            return int(word)
        if self.names is None:
            raise ValueError(
                f"the names of the model's classes aren't known: write an index, 0 to "
                f"{self.count - 1}, in place of {word!r}"
            )
        if word not in self.names:
            hint = did_you_mean(word, self.names, otherwise=first_names(self.names, 3))
            raise ValueError(f"the model has no class {word!r}: {hint}")
        return self.names.index(word)


@dataclass(frozen=True)
class LabelSpace:
    """Which outputs of a model are looked at, and which of them each class of a set is."""

    targets: list[int]
    """Of each class of the set, its place among the outputs that are looked at."""
    names: list[str]
    """Of each class of the set, what to call it."""
    size: int
    """Number of outputs that are looked at."""
    outputs: list[int] | None = None
    """Those; None: all."""
    note: str = ""
    """How the classes were found, where it isn't plain."""

    def restricted(self, model: nn.Module, device: torch.device) -> nn.Module:
        """``model``, which is on ``device``, with those outputs alone."""
        return model if self.outputs is None else _Restricted(model, self.outputs).to(device)

    def translated(self, targets: Tensor) -> Tensor:
        """Labels of the set, (B,) int64, as places among the outputs that are looked at; or which
        labels images have, (B, classes of the set), as (B, ``size``)."""
        if targets.ndim == 2:
            return targets.new_zeros(len(targets), self.size).index_copy_(
                1, torch.tensor(self.targets), targets
            )
        return torch.tensor(self.targets)[targets]

    def chosen(self, values: Sequence[float] | None) -> list[float] | None:
        """Of ``values`` of each class of the model, those of the outputs that are looked at."""
        if values is None:
            return None
        return list(values) if self.outputs is None else [values[i] for i in self.outputs]

    def table(self, result: Result) -> tuple[list[str], Result]:
        """Names and ``result`` with a row for each class of the set; those that are one, once."""
        names: dict[int, dict[str, None]] = {}
        for place, name in zip(self.targets, self.names, strict=True):
            names.setdefault(place, {})[name] = None
        places = list(names)
        return ["+".join(each) for each in names.values()], result.of_classes(places)


class _Restricted(nn.Module):
    def __init__(self, model: nn.Module, outputs: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("outputs", torch.tensor(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, number of outputs) logits."""
        return self.model(images)[:, self.outputs]


def label_space(names: Sequence[str], model: ModelClasses, data: DataOptions) -> LabelSpace:
    """How a set of classes ``names`` is evaluated with ``model``, as ``data`` says.

    Raises:
        OptionError: a file that can't be used, or weights with a head for other classes.
        DataError: the classes are not those that the model knows.
    """
    valid = read_valid_labels(data.valid_labels, model.find) if data.valid_labels else None
    indices, note, found = _indices(names, model, data, valid)
    titles = list(names)
    if found and model.names is not None:
        titles = [model.names[index] for index in indices]
    if valid is None:
        return LabelSpace(indices, titles, model.count, note=note)
    places = {index: place for place, index in enumerate(valid)}
    for name, index in zip(names, indices, strict=True):
        if index not in places:
            raise OptionError(
                "valid_labels",
                f"{data.valid_labels} leaves out class {index}, which images of {name!r} show: "
                "add it to the file",
            )
    note = "; ".join(filter(None, (note, f"--valid-labels: {len(valid)} of {model.count} logits")))
    return LabelSpace([places[i] for i in indices], titles, len(valid), valid, note)


def _indices(
    names: Sequence[str], model: ModelClasses, data: DataOptions, valid: list[int] | None
) -> tuple[list[int], str, bool]:
    """The model's class of each of ``names``, how they were found, and whether each for itself."""
    found = f"{len(names)} classes of the set are %d of the model's {model.count}, by %s"
    if data.class_map:
        mapped = _mapped(names, model, data)
        return mapped, found % (len(set(mapped)), "--class-map"), True
    known = {name: index for index, name in enumerate(model.names or ())}
    if list(names) == list(known):
        return list(known.values()), "", True
    if known.keys() >= set(names):
        how = "their wordnet ids" if model.imagenet else "their names"
        return [known[name] for name in names], found % (len(names), how), True
    there = list(range(model.count)) if valid is None else valid
    numbers = [int(name) for name in names if re.fullmatch(r"[0-9]+", name)]
    of_imagenet = model.names is None or _WORDNET.fullmatch(model.names[0])
    if of_imagenet and sorted(numbers) == sorted(there) and len(numbers) == len(names):
        return numbers, found % (len(names), "their names, which are taken as class indices"), True
    whole = len(names) == len(there)
    if model.imagenet and (whole or all(_WORDNET.match(name) for name in names)):
        named = imagenet.find(names, model.count)
        if set(named) <= set(there):
            return named, found % (len(names), "the names that ImageNet has for them"), True
    _refuse_other_names(names, model, data)
    if not whole:
        raise _other_count(names, model, data, valid)
    if model.imagenet and valid is None and len(numbers) < len(names):
        _refuse_other_words(names, named, model, data)
    order = list(range(len(names)))
    if len(numbers) == len(names):
        order = _order_of_numbers(numbers, data)
    indices = dict(zip(order, there, strict=True))
    how = "their order (of the names of the model's classes nothing is known)"
    return [indices[label] for label in range(len(names))], found % (len(names), how), False


def _mapped(names: Sequence[str], model: ModelClasses, data: DataOptions) -> list[int]:
    """The model's class of each of ``names`` by ``--class-map``."""
    table = read_class_map(data.class_map, model.find)
    for name in names:
        if name not in table:
            hint = did_you_mean(name, table, otherwise="add it")
            raise OptionError(
                "class_map", f"{data.class_map} has no line for {name!r} of {_place(data)}: {hint}"
            )
    return [table[name] for name in names]


def _refuse_other_names(names: Sequence[str], model: ModelClasses, data: DataOptions) -> None:
    """Raise DataError if ``names``, not all of which the model knows, are known to be others."""
    known = set(model.names or ())
    other = [name for name in names if name not in known]
    remedy = "--class-map FILE says which class of the model each is"
    if known and not model.imagenet:
        raise DataError(
            f"the classes of {_place(data)} ({_all_names(names)}) are not those of the model "
            f"({_all_names(model.names)}), which has no {first_names(other, 3)}: {remedy}"
        )
    if known and any(name in known or _WORDNET.fullmatch(name) for name in names):
        raise DataError(
            f"{_place(data)}: {len(other)} of {len(names)} classes are none of the {model.count} "
            f"wordnet ids that the model knows ({first_names(other, 3)}): remove them, or {remedy}"
        )


def _refuse_other_words(
    names: Sequence[str], named: Sequence[int | None], model: ModelClasses, data: DataOptions
) -> None:
    """Raise DataError if ``names`` are as many as the model's classes and not all ImageNet's, while
    those of the model are; of weights that don't say so, if most of ``names`` are.

    Their order would be another one than that of the model.
    """
    other = [name for name, index in zip(names, named, strict=True) if index is None]
    if model.certain or 2 * len(other) < len(names):
        raise DataError(
            f"{_place(data)}: {len(other)} of {len(names)} classes are none of ImageNet's that the "
            f"model knows, or may be several ({first_names(other, 3)}): --class-map FILE says "
            "which class of the model each is"
        )


def _other_count(
    names: Sequence[str], model: ModelClasses, data: DataOptions, valid: list[int] | None
) -> OptionError:
    """The error about a set of another number of classes than the outputs that are looked at."""
    there = f"{_place(data)} has {len(names)} classes"
    if valid is not None:
        return OptionError(
            "valid_labels",
            f"{data.valid_labels} names {len(valid)} classes, {there}: say which class of the "
            "model each is, --class-map FILE",
        )
    if not model.count:
        return OptionError(
            model.option, f"{model.source} has no classifier: train one first, without --eval"
        )
    return OptionError(
        model.option,
        f"{model.source} knows {model.count} classes, {there}: train a head for them first "
        f"(--finetune FILE or --pretrained, without --eval), or, if they are among the "
        f"{model.count}, say which with --class-map FILE or --valid-labels FILE",
    )


def _order_of_numbers(numbers: Sequence[int], data: DataOptions) -> list[int]:
    """The labels of classes named by numbers, the least number first.

    Raises OptionError where that is another order than that of the text and either may be meant.
    """
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    if order != sorted(order) and sorted(numbers) != list(range(len(numbers))):
        raise OptionError(
            "class_map",
            f"the classes of {_place(data)} are named {min(numbers)} … {max(numbers)}: are they "
            "in the order of the numbers or of the text? A file says which class of the model "
            "each is",
        )
    return order


def real_labels(dataset: ImageDataset, space: LabelSpace, model: ModelClasses, file: str) -> Tensor:
    """The right outputs of each image by ``--real-labels``, (N, most of them) int64, for
    ``RealCounts``.

    The images are found by the numbers in their names, ``ILSVRC2012_val_00000001`` first. Raises
    OptionError for a file that can't be used, or that belongs to other images.
    """
    entries = read_real_labels(file, model.count)
    if len(entries) != len(dataset):
        raise OptionError(
            "real_labels",
            f"{file} has the labels of {len(entries)} images, the set has {len(dataset)}: "
            "evaluate ImageNet's whole validation part",
        )
    places = range(model.count) if space.outputs is None else space.outputs
    output = {index: place for place, index in enumerate(places)}
    table = torch.full((len(dataset), max(map(len, entries))), PADDING)
    image_of: dict[int, str] = {}
    for row in range(len(dataset)):
        name = dataset.sample_id(row)
        number = _number_of(name, len(entries), file)
        if number in image_of:
            raise OptionError(
                "real_labels", f"{name} and {image_of[number]} have one number: remove one"
            )
        image_of[number] = name
        for column, index in enumerate(entries[number - 1]):
            table[row, column] = output.get(index, NO_OUTPUT)
    return table


def _number_of(name: str, most: int, file: str) -> int:
    match = _VALIDATION_IMAGE.search(Path(name).name)
    if match is None or not 1 <= int(match[1]) <= most:
        raise OptionError(
            "real_labels",
            f"{file} is for images named ILSVRC2012_val_00000001 to {most:08d}, {name} is none: "
            "evaluate ImageNet's validation part, under its own names",
        )
    return int(match[1])


def _place(data: DataOptions) -> str:
    return data.data_path or data.data_set


def _all_names(names: Sequence[str]) -> str:
    return first_names(names, 3) + (f" {len(names)} in all" if len(names) > 3 else "")
