"""The weight of each class in the loss: ``--class-weights``."""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import bounded
from config.class_weights import parse_class_weights, weight_of
from errors import OptionError, did_you_mean, first_names, shortened, shown
from losses import balanced_weights, effective_weights
from outputs.names import from_csv_cell
from pipeline.dataset import FEW_CLASSES, ImageDataset
from training.label_files import text_of

log = logging.getLogger(__name__)

_OPTION = "class_weights"

Entries = Iterable[tuple[str, str, str]]
"""(place in the file, class name, weight) of each entry."""


def class_weights(text: str, dataset: ImageDataset) -> Tensor | None:
    """The weights that ``--class-weights`` means for the classes of a training part, (C,) float32.

    None for "none". Weights that are counted or read have a mean of 1 over the classes, but for
    those of "balanced", which is n / (C × n_c). The losses divide by the weights of the batch, so
    that a factor of all weights changes nothing.

    Raises OptionError for names that aren't the classes', and where images per class aren't known.
    """
    asked = parse_class_weights(text)
    names = list(dataset.classes)
    if asked.kind == "none":
        return None
    if asked.kind in ("balanced", "effective"):
        counts = _counts(text, dataset)
        balanced = asked.kind == "balanced"
        return balanced_weights(counts) if balanced else effective_weights(counts, asked.beta)
    if asked.kind == "named":
        given = dict(asked.named)
        for name in given:
            _refuse_unknown(name, names, "")
    else:
        given = read_class_weights(asked.file, names)
        missing = [name for name in names if name not in given]
        if missing:
            hint = did_you_mean(missing[0], given.keys() - set(names))
            raise OptionError(
                _OPTION,
                f"{asked.file} has no weight of {len(missing)} of {len(names)} classes "
                f"({first_names(missing)}): add them" + (f"; {hint}" if hint else ""),
            )
    weights = torch.tensor([given.get(name, 1.0) for name in names], dtype=torch.float64)
    return (weights / weights.mean()).float()


def announce_weights(weights: Tensor | None, names: Sequence[str]) -> None:
    """Say the weights: each of a few classes, else the least and the greatest."""
    if weights is None:
        return
    if len(names) <= FEW_CLASSES:
        shown_names = range(len(names))
    else:
        shown_names = [int(weights.argmin()), int(weights.argmax())]
    text = ", ".join(f"{names[i]} {weights[i]:.3g}" for i in shown_names)
    log.info("weights  of the classes in the loss: %s", shortened(text))


def read_class_weights(file: str, names: Sequence[str]) -> dict[str, float]:
    """The weight of each class in a file, by name.

    CSV has a name and a weight on each line, with or without a header; JSON is
    ``{"NAME": WEIGHT}``; any other file has ``NAME WEIGHT`` on each line. Raises OptionError with
    the place of what is no such entry, of a name that is none of ``names``, and of one that comes
    twice.
    """
    suffix = Path(file).suffix.lower()
    content = text_of(_OPTION, file, "save it as UTF-8")
    if suffix == ".json":
        entries = _of_json(file, content)
    elif suffix in (".csv", ".tsv"):
        entries = _of_csv(file, content)
    else:
        entries = _of_lines(content)
    found: dict[str, float] = {}
    for place, name, value in entries:
        weight = weight_of(value)
        if weight is None:
            raise OptionError(
                _OPTION,
                f"{file}, {place}: {shown(value)} is no weight: a name and a number above 0",
            )
        _refuse_unknown(name, names, f"{file}, {place}: ")
        if name in found:
            raise OptionError(_OPTION, f"{file}, {place}: {shown(name)} is there already")
        found[name] = weight
    if not found:
        raise OptionError(_OPTION, f"{file} holds no weights: write a name and a weight on a line")
    return found


def _counts(text: str, dataset: ImageDataset) -> Tensor:
    if dataset.targets is None:
        raise OptionError(
            _OPTION,
            f"{text} needs the label of every image beforehand, which this data set doesn't give: "
            "leave it out, or give a weight for each class in a file",
        )
    return torch.from_numpy(np.bincount(dataset.targets, minlength=len(dataset.classes)))


def _refuse_unknown(name: str, names: Sequence[str], where: str) -> None:
    if name not in names:
        hint = did_you_mean(name, names, otherwise=f"they are {first_names(names)}")
        raise OptionError(_OPTION, f"{where}no class is called {shown(name)}; {hint}")


def _of_json(file: str, content: str) -> Entries:
    try:
        found = bounded.parse_json(content, object_pairs_hook=tuple)
    except ValueError as error:
        raise OptionError(
            _OPTION, f"{file}: not JSON ({shortened(str(error))}): correct it"
        ) from None
    # An object, or a list of lists, which can't be told apart and needn't be.
    whole = isinstance(found, tuple) and all(isinstance(name, str) for name, _ in found)
    if not whole:
        raise OptionError(_OPTION, f'{file} is not {{"NAME": WEIGHT}}: write that')
    return [(f"entry {i}", name, str(value)) for i, (name, value) in enumerate(found, start=1)]


def _of_csv(file: str, content: str) -> Entries:
    content = content.removeprefix("\ufeff")
    delimiter = max(",;\t", key=content.partition("\n")[0].count)
    try:
        rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise OptionError(_OPTION, f"{file}: not CSV ({error}): correct it") from None
    for number, row in enumerate(rows, start=1):
        row = [cell.strip() for cell in row]
        header = number == 1 and len(row) == 2 and not any(c.isdigit() for c in row[1])
        if not any(row) or header:
            continue
        name, value = (row[0], row[1]) if len(row) == 2 else (delimiter.join(row), "")
        yield f"line {number}", from_csv_cell(name), value


def _of_lines(content: str) -> Entries:
    for number, line in enumerate(content.removeprefix("\ufeff").splitlines(), start=1):
        words = line.rsplit(None, 1)
        if words:
            name, value = words if len(words) == 2 else (words[0], "")
            yield f"line {number}", name.strip(), value
