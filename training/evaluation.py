"""``--eval``: evaluate a checkpoint, or weights from elsewhere, on a validation set."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import engine
import inference
import utils
from architectures.factory import has_published_weights, published_cfg
from architectures.memory_format import to_channels_last, wants_channels_last
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Transform
from augmentation.transforms import build_transform
from checkpointing.files import (
    class_names_of,
    load_checkpoint,
    model_of,
    named,
    split_of,
    task_of,
    thresholds_of,
    weights_of,
)
from checkpointing.folder import BEST, load_newest
from checkpointing.published import classes_of, label_names
from checkpointing.variants import FORM_OPTIONS, form_options
from config import CHECKPOINT, DEFAULT, Config
from distributed.processes import Processes, on_main_process
from errors import DataError, OptionError
from loggers import PER_CLASS_FILE, PER_CLASS_LIMIT, write_per_class
from optimization.counts import Evaluation, RealCounts
from optimization.multilabel import MultiLabelEvaluation, Result, counts_of
from outputs.files import Outputs
from pipeline import imagenet
from pipeline.dataset import Batch, ImageDataset, build_dataset, findings
from pipeline.progress import ProgressBar
from pipeline.sources.registry import validation_classes
from training.agreement import agree_on_data, agree_on_weights
from training.build import build_model, compiled
from training.data import build_val_loader, read_once
from training.image_options import asked_preprocessing
from training.label_space import LabelSpace, ModelClasses, label_space, real_labels
from training.resume import make_writable, output_folder

log = logging.getLogger(__name__)


class _Candidates(NamedTuple):
    """What is to be evaluated, and on which classes."""

    source: str
    """The file, or where the weights come from."""
    models: dict[str, nn.Module]
    """The model, and its moving average if there is one, by the name in messages."""
    data_set: ImageDataset
    """The validation set, as these models see it."""
    classes: ModelClasses
    space: LabelSpace
    """Which outputs of the models the classes of the set are."""
    thresholds: dict[str, list[float]]
    """Of a multi-label checkpoint's models, by their name; those of other weights are found."""


def evaluate_checkpoint(config: Config, processes: Processes, device: torch.device) -> int:
    """``--eval``: evaluate a checkpoint (its average too), or published or given weights."""
    if config.data.batch_size == "auto":
        config = config.replace("--eval", batch_size=64)
    folder = output_folder(config)
    on_main_process(processes, lambda: make_writable(folder))
    found = _candidates(config, processes, device)
    agree_on_data(processes, {"validation": found.data_set}, config.data.data_path)
    for model in found.models.values():
        agree_on_weights(processes, model.state_dict(), "evaluate")
    space, right = found.space, None
    if config.data.real_labels:
        right = real_labels(found.data_set, space, found.classes, config.data.real_labels)
    loader = build_val_loader(config, found.data_set, processes)
    channels_last = wants_channels_last(found.models["model"], config.model.channels_last)
    if channels_last:
        for model in found.models.values():
            to_channels_last(model)
    settings = engine.StepSettings(
        device=device,
        amp=utils.amp_dtype(config.optim.amp, device),
        channels_last=channels_last,
    )
    classes = len(found.data_set.classes)
    log.info("%s on %d images of %d classes", found.source, len(found.data_set), classes)
    if space.note:
        log.info("       %s", space.note)
    outputs = Outputs()
    for name, model in found.models.items():
        bar = ProgressBar(f"evaluate {name}", len(loader), visible=processes.is_main)
        bad: dict[str, None] = {}
        real = None if right is None else RealCounts(right, space.size, device)
        result = engine.evaluate(
            space.restricted(compiled(config, model), device),
            _noting(loader, space, bad),
            settings,
            num_classes=space.size,
            batch_size=loader.batch_size,
            shared=config.dist.dist_eval,
            progress=bar.to,
            real=real,
            counts=counts_of(
                config.data.task, space.size, device, space.chosen(found.thresholds.get(name))
            ),
        )
        bar.close()
        _report(name, result, real, list(bad))
        names, table = space.table(result)
        if processes.is_main and len(names) <= PER_CLASS_LIMIT:
            path = folder / f"eval_{name.lower()}_{PER_CLASS_FILE}"
            table_of = partial(write_per_class, class_names=names, result=table)
            if outputs.write(path, table_of):
                log.info("       each class: %s", path)
    return 0


def _candidates(config: Config, processes: Processes, device: torch.device) -> _Candidates:
    """What the options name.

    Raises DataError or OptionError if the classes of the data set are not the model's.
    """
    option, source, content = _weights(config)
    held = model_of(content) if option == "resume" else None
    whole = held is not None
    if whole and task_of(content) != config.data.task:
        raise OptionError("task", f"the checkpoint is of --task {task_of(content)}: leave it out")
    if option == "resume" and not whole:
        # Published weights, of the model that --model names.
        config = config.replace("--resume", finetune=source, resume="")
    known = _known_classes(config, option, source, content)

    def build() -> tuple[ImageDataset, ...]:
        alone = validation_classes(config.data)
        seed, before = split_of(content, config.run.seed)
        return (build_dataset(False, config.data, seed=seed, classes=alone, held_out=before),)

    (val,) = read_once(config, processes, build)
    for text in findings(val):
        log.warning("%s", text)
    if known is None:  # what the model lacks shows when the weights are loaded
        known = ModelClasses(option, source, len(val.classes), list(val.classes))
    space = label_space(val.classes, known, config.data)
    if whole:
        _refuse_other_model(config, held, content["config"])
        with named(source):
            models, transform = _whole(config, content, device)
    else:
        model, preprocessing = build_model(config, known.count, device)
        models = {"model": model}
        transform = build_transform(False, preprocessing, config.augment)
    held_ones = {"model": thresholds_of(content), "EMA": thresholds_of(content, ema=True)}
    thresholds = {name: list(values) for name, values in held_ones.items() if whole and values}
    return _Candidates(source, models, val.with_transform(transform), known, space, thresholds)


def _whole(
    config: Config, content: dict[str, Any], device: torch.device
) -> tuple[dict[str, nn.Module], Transform]:
    """The models in a checkpoint of a run by name, and how they see an image."""
    trained = Preprocessing.from_dict(content["preprocessing"])
    preprocessing = asked_preprocessing(config, trained)
    models = {}
    for name, ema in (("model", False), ("EMA", True)):
        if not ema or content.get("model_ema") is not None:
            models[name], transform, _ = inference.from_content(
                content, device=device, ema=ema, preprocessing=preprocessing
            )
    return models, transform


def _weights(config: Config) -> tuple[str, str, dict[str, Any]]:
    """The option that names what is evaluated, what to call it, and what its file holds."""
    if config.run.resume:
        return "resume", *_checkpoint_to_evaluate(config)
    if config.model.finetune:
        return "finetune", config.model.finetune, inference.read_content(config.model.finetune)
    return "pretrained", "published weights", {}


def _known_classes(
    config: Config, option: str, source: str, content: dict[str, Any]
) -> ModelClasses | None:
    """What is known of the classes of these weights; None where nothing is."""
    names = class_names_of(content)
    if names is not None:
        return ModelClasses.of(option, source, len(names), names)
    cfg = published_cfg(config.model.model)
    if option == "pretrained":
        if not has_published_weights(cfg):
            return None
        count, who = classes_of(cfg), f"what is published as {config.model.model}"
        with named(config.model.model):
            names = label_names(cfg) or imagenet.class_names(count)
        return ModelClasses.of(option, who, count, names)
    with named(source):
        weights, layers = weights_of(content), cfg["classifier"] or ()
    layers = (layers,) if isinstance(layers, str) else layers
    heads = [weights[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in weights]
    return ModelClasses.of(option, source, len(heads[0])) if heads else None


def _report(name: str, result: Result, real: RealCounts | None, bad: Sequence[str]) -> None:
    """Say what came of an evaluation. Raises DataError if no image could be read."""
    if result.count == 0:
        raise DataError("no validation image could be read")
    log.info("%-6s %s  loss %.4f  (%d images)", name, _shown(result), result.loss, result.count)
    if isinstance(result, Evaluation):
        scores = result.scores()
        log.info(
            "       of the classes: mean accuracy %.3f %%  mean F1 %.3f %%  worst %.3f %%",
            scores["balanced_acc"],
            scores["macro_f1"],
            scores["worst_class_acc"],
        )
    if isinstance(result, MultiLabelEvaluation) and (left_out := result.left_out()):
        log.info("       %d classes without a positive image are left out of the means", left_out)
    if real is not None:
        found = real.result()
        accuracies = _accuracies(found.acc1, found.acc5)
        log.info("       ReaL %s  (%d images with labels)", accuracies, found.count)
    if bad:
        log.warning("%d images could not be read: %s", len(bad), "; ".join(bad))


def _shown(result: Result) -> str:
    if isinstance(result, Evaluation):
        return _accuracies(result.acc1, result.acc5)
    scores = result.scores()
    return (
        f"mAP {scores['map']:.3f} %  F1 macro {scores['macro_f1']:.3f} % micro "
        f"{scores['micro_f1']:.3f} %, at each class's threshold {scores['macro_f1_best']:.3f} % "
        f"and {scores['micro_f1_best']:.3f} %"
    )


def _accuracies(acc1: float, acc5: float | None) -> str:
    return f"top-1 {acc1:.3f} %" + ("" if acc5 is None else f"  top-5 {acc5:.3f} %")


def _noting(batches: Iterable[Batch], space: LabelSpace, bad: dict[str, None]) -> Iterator[Batch]:
    """The batches, with targets of ``space``; images that couldn't be read are noted in ``bad``."""
    for batch in batches:
        bad |= dict.fromkeys(batch.bad)
        yield batch._replace(targets=space.translated(batch.targets))


def _refuse_other_model(config: Config, held: str, saved: Mapping[str, Any]) -> None:
    """Raise OptionError if ``--model``, or an option of its form, asks for another model than the
    checkpoint's, which was written with the options ``saved``."""
    own, wanted = form_options(saved), form_options(config.recipe())
    for name in FORM_OPTIONS:
        other = config.origin[name] not in (DEFAULT, CHECKPOINT) and wanted.get(name)
        if other and other != own.get(name):
            raise OptionError(name, "the checkpoint's model has its own form: leave it out")
    asked = config.origin["model"] not in (DEFAULT, CHECKPOINT)
    if asked and config.model.model != held:
        raise OptionError("model", f"the checkpoint holds {held}: leave --model out")


def _checkpoint_to_evaluate(config: Config) -> tuple[str, dict[str, Any]]:
    """The file of ``--resume``; ``auto`` is the best of the output directory, or its newest."""
    if config.run.resume != "auto":
        return config.run.resume, inference.read_content(config.run.resume)
    folder = output_folder(config)
    if (folder / BEST).exists():
        return str(folder / BEST), load_checkpoint(folder / BEST)
    latest = load_newest(folder)
    if latest is None:
        raise OptionError("resume", f"there is no checkpoint in {folder}: name a file")
    return str(latest[0]), latest[1]
