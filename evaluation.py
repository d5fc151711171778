"""``--eval``: judge a checkpoint, or weights from elsewhere, on a validation set."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import checkpoint
import datasets
import engine
import inference
import models
import utils
from augment import Preprocessing
from build import build_model, build_val_loader, compiled, three_values
from config import CHECKPOINT, DEFAULT, Config
from errors import DataError, OptionError
from loggers import (
    PER_CLASS_FILE,
    PER_CLASS_LIMIT,
    ProgressBar,
    write_per_class,
)
from resume import make_writable, output_folder

log = logging.getLogger(__name__)


def evaluate_checkpoint(config: Config, processes: utils.Processes, device: torch.device) -> int:
    """``--eval``: judge a checkpoint (its average too), or published or given weights."""
    folder = output_folder(config)
    utils.on_main_process(processes, lambda: make_writable(folder))
    class_names, content = None, None
    if config.run.resume:
        source, content = _checkpoint_to_judge(config)
        if "config" not in content:
            # Published weights, of the model that --model names.
            content, config = None, config.replace("--resume", finetune=source, resume="")
    if content is not None:
        class_names = content.get("class_names")
    with utils.main_process_first(processes):
        val = datasets.build_dataset(
            False, config.data, None, seed=config.run.seed, classes=class_names
        )
    candidates: dict[str, nn.Module] = {}
    if content is not None:
        preprocessing = _asked_preprocessing(config, content)
        classifier = inference.from_content(content, device=device, preprocessing=preprocessing)
        candidates["model"], val.transform, class_names = classifier
        if content.get("model_ema") is not None:
            candidates["EMA"] = inference.from_content(
                content, device=device, ema=True, preprocessing=preprocessing
            ).model
    else:
        source, class_names = config.model.finetune or "published weights", val.classes
        candidates["model"], preprocessing = build_model(config, len(class_names), device)
        val.transform = datasets.build_transform(False, preprocessing, config.augment)
    if list(val.classes) != list(class_names):
        raise DataError(
            f"the classes of {config.data.data_path or config.data.data_set} "
            f"({_some(val.classes)}) are not those of the model ({_some(class_names)})"
        )
    loader = build_val_loader(config, val, processes)
    channels_last = models.wants_channels_last(candidates["model"], config.model.channels_last)
    if channels_last:
        for model in candidates.values():
            model.to(memory_format=torch.channels_last)
    options = engine.StepOptions(
        device=device,
        amp=utils.amp_dtype(config.optim.amp, device),
        channels_last=channels_last,
    )
    log.info("%s on %d pictures of %d classes", source, len(val), len(class_names))
    for name, model in candidates.items():
        bar = ProgressBar(f"evaluate {name}", len(loader), visible=processes.is_main)
        bad: dict[str, None] = {}
        result = engine.evaluate(
            compiled(config, model),
            _noting(loader, bad),
            options,
            num_classes=len(class_names),
            batch_size=loader.batch_size,
            shared=config.dist.dist_eval,
            progress=bar.to,
        )
        bar.close()
        if result.count == 0:
            raise DataError("no validation picture could be read")
        top5 = "" if result.acc5 is None else f"  top-5 {result.acc5:.3f} %"
        log.info(
            "%-6s top-1 %.3f %%%s  loss %.4f  (%d pictures)",
            name, result.acc1, top5, result.loss, result.count,
        )  # fmt: skip
        if bad:
            log.warning("%d pictures could not be read: %s", len(bad), "; ".join(bad))
        if processes.is_main and len(class_names) <= PER_CLASS_LIMIT:
            path = folder / f"eval_{name.lower()}_{PER_CLASS_FILE}"
            write_per_class(path, class_names, result)
            log.info("       each class: %s", path)
    return 0


def _noting(batches: Iterable[datasets.Batch], bad: dict[str, None]) -> Iterator[datasets.Batch]:
    """The batches; the pictures that couldn't be read are noted in ``bad``."""
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


def _checkpoint_to_judge(config: Config) -> tuple[str, dict[str, Any]]:
    """The file of ``--resume``; ``auto`` is the best of the output directory, or its newest."""
    if config.run.resume != "auto":
        return config.run.resume, checkpoint.load_file(config.run.resume)
    folder = output_folder(config)
    if (folder / checkpoint.BEST).exists():
        return str(folder / checkpoint.BEST), checkpoint.load_file(folder / checkpoint.BEST)
    latest = checkpoint.load_latest(folder)
    if latest is None:
        raise OptionError("resume", f"there is no checkpoint in {folder}: name a file")
    return str(latest[0]), latest[1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if len(names) > 3 else "")
