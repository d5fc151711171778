"""A trained model named on a command line, and the images it classifies or is evaluated on."""

import argparse
import copy
import csv
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import config
import inference
import utils
from checkpointing.files import named, split_of
from checkpointing.published import is_published, short_name
from distributed.processes import Processes
from errors import DataError, OptionError, UserError, first_names
from inference import Classifier
from optimization import multilabel
from pipeline import imagenet
from pipeline.dataset import ImageDataset, build_dataset
from pipeline.loader import Loader
from pipeline.sources.registry import validation_classes
from pipeline.sources.scan import image_files
from pipeline.sources.tables import lines_of, opened_text
from tools.common import command
from tools.common.labels import is_multilabel
from training.data import build_val_loader
from training.plugins import import_plugins

SOME_UNREADABLE = 4  # exit code: done, but for images that could not be read


class Trained(NamedTuple):
    """A model that is open, and where it came from."""

    classifier: Classifier
    content: dict[str, Any]
    """What its checkpoint holds; empty for an ONNX file."""
    device: torch.device


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``MODEL --ema --device --plugin``."""
    parser.add_argument(
        "model",
        help="checkpoint, exported .onnx or .safetensors file, or published model: timm/NAME, "
        "hf-hub:OWNER/NAME, or a folder in timm's hub form",
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--plugin", action="append", default=[], help="Python file that registers the model or data"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """``--data-path --data-set --val-fraction --num-workers --batch-size``."""
    parser.add_argument("--data-path", help="other images than the run's (folder or CSV file)")
    parser.add_argument("--data-set", help="other kind of data set than the run's, see options.md")
    parser.add_argument("--val-fraction", type=float, help="the held-out share to evaluate on")
    parser.add_argument("--num-workers", default="auto", help="worker processes")
    add_batch_size(parser)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """``--batch-size``."""
    parser.add_argument("--batch-size", type=command.positive, default=64, help="images at a time")


def open_model(arguments: argparse.Namespace) -> Trained:
    """The model that ``add_model_arguments`` asked for."""
    import_plugins(arguments.plugin)
    device = utils.pick_device(arguments.device)
    if arguments.model.endswith(".onnx"):
        classifier = inference.load_for_inference(arguments.model, device=device, ema=arguments.ema)
        return Trained(classifier, {}, device)
    with named(arguments.model):
        content = inference.read_content(arguments.model)
        classifier = inference.from_content(content, device=device, ema=arguments.ema)
    if is_multilabel(classifier):
        # What is written with the average has those of the average.
        content = {**content, "thresholds": classifier.thresholds}
    return Trained(classifier, content, device)


def stem(model: str) -> Path:
    """The path of a model without its suffix, for what is written beside it.

    A published model by name is taken to lie in ``output/NAME``, as if it had been trained here.
    """
    path = Path(model)
    if not is_published(model):
        return path.with_suffix("")
    return path if path.exists() else Path("output", short_name(model), short_name(model))


def on_device(classifier: Classifier, content: dict[str, Any], device: str) -> Trained:
    """A model that is in memory, on the device that was asked for."""
    where = utils.pick_device(device)
    classifier.model.to(where)
    return Trained(classifier, content, where)


# --- a data set -----------------------------------------------------------------------------------


def loader(arguments: argparse.Namespace, trained: Trained, *, training: bool = False) -> Loader:
    """Batches of the run's validation part, or of the one that was asked for instead.

    ``training``: of the training part, in order and without augmentation. Images that can't be
    read are left out and named in ``Batch.bad``. Raises OptionError for data that can't be had,
    DataError for other classes than the model's.
    """
    options = _options(arguments, trained)
    names = trained.classifier.class_names
    dataset = _dataset(options, names, training, trained.content)
    if names == inference.unnamed(len(dataset.classes)):
        _take_in_order(dataset.classes, options)
    elif list(dataset.classes) not in (names, imagenet.ids_of(names)):
        given = options.data.data_path or options.data.data_set
        raise DataError(
            f"the {len(dataset.classes)} classes of {given} ({first_names(dataset.classes, 3)}) "
            f"are not the model's {len(names)} ({first_names(names, 3)}): name other images with "
            "--data-path"
        )
    source = copy.copy(dataset.source)
    source.classes = names  # in place of WordNet ids
    # In order and whole, as for an evaluation: also where it is the training part.
    images = ImageDataset(
        source, trained.classifier.transform, on_bad_image=options.data.on_bad_image
    )
    return build_val_loader(options, images, Processes())


def _take_in_order(names: Sequence[str], options: config.Config) -> None:
    """Say that the classes ``names`` are taken for the model's in turn, of whose names nothing is
    known. Raises DataError for numbers in the order of text, which may mean another one."""
    if all(name.isdecimal() for name in names) and list(names) != sorted(names, key=int):
        raise DataError(
            f"the classes of {options.data.data_path} are sorted as text, {first_names(names, 3)}: "
            "give their numbers leading zeros"
        )
    print("note: the model's classes have no names: taken in the order of the set", file=sys.stderr)


def _dataset(
    options: config.Config, names: list[str], training: bool, content: dict[str, Any]
) -> ImageDataset:
    """The images, of classes ``names``; ImageNet's may have folders named by WordNet ids."""

    seed, before = split_of(content, options.run.seed)

    def build(classes: Sequence[str] | None) -> ImageDataset:
        return build_dataset(training, options.data, seed=seed, classes=classes, held_out=before)

    if training:
        return build(None)
    if names == inference.unnamed(len(names)):
        return build(validation_classes(options.data))
    ids = imagenet.ids_of(names)
    try:
        return build(ids or names)
    except DataError:
        if ids is None:
            raise
    return build(names)


def _options(arguments: argparse.Namespace, trained: Trained) -> config.Config:
    saved = trained.content.get("config", {})
    values = {k: v for k, v in saved.items() if k != "plugin" and config.is_option(k)}
    # An ONNX file has no options; test_loss is logged for each task.
    values |= {"task": trained.classifier.task, "best_metric": "test_loss"}
    if not (arguments.data_path or arguments.data_set or values.get("data_set")):
        raise OptionError("data_path", "what it was trained on isn't known here: add it")
    if arguments.data_path:
        # The bundled digits have no path: another one means other images.
        kind = values.get("data_set", "IMNET") if values.get("data_path") else "IMNET"
        is_table = Path(arguments.data_path).is_file()
        values |= {"data_path": arguments.data_path, "data_set": "CSV" if is_table else kind}
        values |= {"val_fraction": None}
    if arguments.data_set:
        values["data_set"] = arguments.data_set
    if arguments.val_fraction:
        values["val_fraction"] = arguments.val_fraction
    values |= {"num_workers": arguments.num_workers, "eval_batch_size": arguments.batch_size}
    values |= {"on_bad_image": "skip", "batch_size": arguments.batch_size, "fsdp": False}
    return config.from_flat(values, {})


# --- files ----------------------------------------------------------------------------------------


def find_images(inputs: Sequence[str]) -> list[str]:
    """The image files of files, folders, patterns, CSV files and ``-`` (one path per line).

    A file that doesn't exist is kept: reading it says so. Raises UserError for an input that names
    nothing.
    """
    return [path for given in inputs for path in _paths_of(given)]


def _paths_of(given: str) -> list[str]:
    if given == "-":
        return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        found = sorted(image_files(path))
        if not found:
            raise UserError(f"{given}: no images in this folder")
        return found
    if path.suffix.lower() == ".csv":
        return [os.path.join(path.parent, name) for name in _column_of_paths(path)]
    if not path.exists() and glob.has_magic(given):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not found:
            raise UserError(f"{given}: no file matches")
        return found
    return [str(path)]


def _column_of_paths(path: Path) -> list[str]:
    """The column of a CSV file whose header says path, image or file, else its first column."""
    try:
        with opened_text(path) as file:
            rows = [row for row in csv.reader(lines_of(path, file)) if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} can't be read: {error}") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = [header.index(name) for name in ("path", "image", "file") if name in header]
    if named:
        rows = rows[1:]
    column = named[0] if named else 0
    found = [row[column].strip() for row in rows if len(row) > column and row[column].strip()]
    if not found:
        raise UserError(f"{path} names no images")
    return found


# --- answers --------------------------------------------------------------------------------------


@torch.no_grad()
def probabilities(classifier: Classifier, images: Tensor, *, flip: bool = False) -> Tensor:
    """(B, C, H, W) images to (B, K) float32; ``flip`` takes the mean with the mirrored ones'.

    Those of a multi-label model are float64 in host memory, as thresholds are chosen among, and
    don't sum to 1. Raises UserError where they are not finite.
    """
    squash = _of_labels if is_multilabel(classifier) else partial(F.softmax, dim=1)
    answers = squash(classifier.model(images).float())
    if flip:
        answers = (answers + squash(classifier.model(images.flip(3)).float())) / 2
    if not torch.isfinite(answers).all():
        raise UserError(
            "the model's answers are not finite: python -m tools.inspect MODEL names bad weights"
        )
    return answers


def _of_labels(logits: Tensor) -> Tensor:
    return torch.from_numpy(multilabel.probabilities(logits.cpu().numpy()))


def chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """``items`` in runs of ``size``, the last may be shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
