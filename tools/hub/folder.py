"""A folder in timm's hub form: ``config.json``, ``model.safetensors`` and a model card."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import model_entrypoint
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from architectures.first_conv import COLOURS
from augmentation.preprocessing import Preprocessing
from checkpointing.digest import save_safetensors
from checkpointing.files import MULTILABEL, task_of, thresholds_of
from checkpointing.task_notes import task_notes
from loggers import CURVES_FILE
from outputs.console import say
from tools.common import command
from tools.hub.card import Run, card
from tools.hub.form import HubForm, hub_form, timms_own
from utils import written_whole

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def writer(
    run: Run, repository: str | None = None
) -> Callable[[nn.Module, Tensor, Path, Mapping[str, str]], None]:
    """A writer as those of ``tools.export``; ``repository`` is where the folder will be pushed."""

    def write(model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str]) -> None:
        form = hub_form(model, example)
        preprocessing = Preprocessing.from_dict(run.content["preprocessing"])
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder / CONFIG, form, run.content, preprocessing)
        weights = {k: v.contiguous().clone() for k, v in form.model.state_dict().items()}
        with written_whole(folder / WEIGHTS) as temporary:
            # transformers reads no file without a format.
            save_safetensors(temporary, weights, {"format": "pt"})
        if run.curves:
            shutil.copyfile(run.curves, folder / CURVES_FILE)
        command.write_text(folder / CARD, card(run, form, preprocessing, repository))
        if form.needs:
            say(
                f"note: timm has no {form.architecture}: whoever loads {folder} with timm or "
                f"transformers imports {form.needs} of this project first"
            )

    return write


def _write_config(
    path: Path, form: HubForm, content: Mapping[str, Any], preprocessing: Preprocessing
) -> None:
    names, task, thresholds = content["class_names"], task_of(content), thresholds_of(content)
    cfg = form.model.pretrained_cfg
    config = {
        "architecture": form.architecture,
        "num_classes": len(names),
        "num_features": form.model.num_features,
        "label_names": list(names),
        "model_args": form.model_args,
        "pretrained_cfg": {
            "num_classes": len(names),
            "input_size": [preprocessing.channels, *preprocessing.size],
            "crop_pct": preprocessing.crop_ratio,
            "crop_mode": preprocessing.crop_mode,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "notes": [*preprocessing.notes(), *task_notes(task, thresholds)],
            **{k: cfg[k] for k in _kept(preprocessing) if cfg.get(k)},
        },
    }
    config["preprocessing"] = preprocessing.exported()  # timm reads what is above alone
    if task == MULTILABEL:  # transformers: its loss is BCE, its pipeline takes sigmoids
        config["problem_type"] = "multi_label_classification"
    pool = getattr(form.model, "global_pool", None) or cfg.get("global_pool")
    config |= {"global_pool": pool} if isinstance(pool, str) else {}
    command.write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _kept(preprocessing: Preprocessing) -> tuple[str, ...]:
    """Fields of a ``pretrained_cfg`` that go on as they are.

    Where timm knows the first convolution it adapts it from three channels to others, which these
    weights are for already.
    """
    first_conv = ("first_conv",) if preprocessing.channels == COLOURS else ()
    return ("fixed_input_size", *first_conv, "classifier")


def opened(folder: Path) -> nn.Module:
    """The model of a folder, built by timm's own code where the architecture is timm's."""
    cfg, architecture, model_args = load_model_config_from_path(folder)
    entry = timms_own(architecture) or model_entrypoint(architecture)
    return entry(pretrained=True, pretrained_cfg=cfg, **model_args).eval()


def remove(folder: Path) -> None:
    """Remove what was written; other files of the folder stay."""
    for name in (CONFIG, WEIGHTS, CARD, CURVES_FILE):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
