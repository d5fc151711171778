"""``--eval``: evaluate a checkpoint, or weights from elsewhere, on a validation set."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import engine
import inference
import utils
from architectures.factory import wants_channels_last
from augmentation.transforms import Preprocessing, build_transform
from checkpointing.files import load_checkpoint
from checkpointing.folder import BEST, load_newest
from config import CHECKPOINT, DEFAULT, Config
from distributed.processes import Processes, main_process_first, on_main_process
from errors import DataError, OptionError, first_names
from loggers import PER_CLASS_FILE, PER_CLASS_LIMIT, write_per_class
from optimization.counts import Evaluation
from pipeline.dataset import Batch, ImageDataset, build_dataset
from pipeline.progress import ProgressBar
from training.build import build_model, compiled, three_values
from training.data import build_val_loader
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
    class_names: list[str]


def evaluate_checkpoint(config: Config, processes: Processes, device: torch.device) -> int:
    """``--eval``: evaluate a checkpoint (its average too), or published or given weights."""
    if config.data.batch_size == "auto":
        config = config.replace("--eval", batch_size=64)
    folder = output_folder(config)
    on_main_process(processes, lambda: make_writable(folder))
    found = _candidates(config, processes, device)
    loader = build_val_loader(config, found.data_set, processes)
    channels_last = wants_channels_last(found.models["model"], config.model.channels_last)
    if channels_last:
        for model in found.models.values():
            model.to(memory_format=torch.channels_last)
    settings = engine.StepSettings(
        device=device,
        amp=utils.amp_dtype(config.optim.amp, device),
        channels_last=channels_last,
    )
    classes = len(found.class_names)
    log.info("%s on %d images of %d classes", found.source, len(found.data_set), classes)
    for name, model in found.models.items():
        bar = ProgressBar(f"evaluate {name}", len(loader), visible=processes.is_main)
        bad: dict[str, None] = {}
        result = engine.evaluate(
            compiled(config, model),
            _noting(loader, bad),
            settings,
            num_classes=classes,
            batch_size=loader.batch_size,
            shared=config.dist.dist_eval,
            progress=bar.to,
        )
        bar.close()
        _report(name, result, list(bad))
        if processes.is_main and classes <= PER_CLASS_LIMIT:
            path = folder / f"eval_{name.lower()}_{PER_CLASS_FILE}"
            write_per_class(path, found.class_names, result)
            log.info("       each class: %s", path)
    return 0


def _candidates(config: Config, processes: Processes, device: torch.device) -> _Candidates:
    """What the options name. Raises DataError if its classes are not those of the data set."""
    class_names, content = None, None
    if config.run.resume:
        source, content = _checkpoint_to_evaluate(config)
        if "config" not in content:
            # Published weights, of the model that --model names.
            content, config = None, config.replace("--resume", finetune=source, resume="")
        else:
            class_names = content.get("class_names")
    with main_process_first(processes):
        val = build_dataset(False, config.data, seed=config.run.seed, classes=class_names)
    models: dict[str, nn.Module] = {}
    if content is not None:
        preprocessing = _asked_preprocessing(config, content)
        models["model"], transform, class_names = inference.from_content(
            content, device=device, preprocessing=preprocessing
        )
        if content.get("model_ema") is not None:
            models["EMA"] = inference.from_content(
                content, device=device, ema=True, preprocessing=preprocessing
            ).model
    else:
        source, class_names = config.model.finetune or "published weights", val.classes
        models["model"], preprocessing = build_model(config, len(class_names), device)
        transform = build_transform(False, preprocessing, config.augment)
    if list(val.classes) != list(class_names):
        raise DataError(
            f"the classes of {config.data.data_path or config.data.data_set} "
            f"({_all_names(val.classes)}) are not those of the model ({_all_names(class_names)})"
        )
    return _Candidates(source, models, val.with_transform(transform), list(class_names))


def _report(name: str, result: Evaluation, bad: Sequence[str]) -> None:
    """Say what came of an evaluation. Raises DataError if no image could be read."""
    if result.count == 0:
        raise DataError("no validation image could be read")
    top5 = "" if result.acc5 is None else f"  top-5 {result.acc5:.3f} %"
    log.info(
        "%-6s top-1 %.3f %%%s  loss %.4f  (%d images)",
        name,
        result.acc1,
        top5,
        result.loss,
        result.count,
    )
    if bad:
        log.warning("%d images could not be read: %s", len(bad), "; ".join(bad))


def _noting(batches: Iterable[Batch], bad: dict[str, None]) -> Iterator[Batch]:
    """The batches; the images that couldn't be read are noted in ``bad``."""
    for batch in batches:
        bad |= dict.fromkeys(batch.bad)
        yield batch


def _asked_preprocessing(config: Config, content: dict[str, Any]) -> Preprocessing:
    """The checkpoint's preprocessing, but for what was asked for beside it."""

    def asked(name: str) -> bool:
        return config.origin[name] not in (DEFAULT, CHECKPOINT)

    if asked("model") and config.model.model != content["config"]["model"]:
        raise OptionError(
            "model", f"the checkpoint holds {content['config']['model']}: leave --model out"
        )
    changes: dict[str, Any] = {}
    if asked("input_size"):
        changes["input_size"] = config.model.input_size
    if asked("eval_crop_ratio"):
        changes["crop_ratio"] = config.data.eval_crop_ratio
    for name in ("mean", "std"):
        values = getattr(config.data, name)
        if asked(name) and values is not None:
            changes[name] = three_values(values)
    return dataclasses.replace(Preprocessing.from_dict(content["preprocessing"]), **changes)


def _checkpoint_to_evaluate(config: Config) -> tuple[str, dict[str, Any]]:
    """The file of ``--resume``; ``auto`` is the best of the output directory, or its newest."""
    if config.run.resume != "auto":
        return config.run.resume, load_checkpoint(config.run.resume)
    folder = output_folder(config)
    if (folder / BEST).exists():
        return str(folder / BEST), load_checkpoint(folder / BEST)
    latest = load_newest(folder)
    if latest is None:
        raise OptionError("resume", f"there is no checkpoint in {folder}: name a file")
    return str(latest[0]), latest[1]


def _all_names(names: Sequence[str]) -> str:
    return first_names(names, 3) + (f" {len(names)} in all" if len(names) > 3 else "")
