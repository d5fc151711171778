"""What the options leave open about the images comes from the weights that are used.

Published weights were trained for one size, crop, filter and normalisation; judged or fine-tuned
with others they lose accuracy and nothing says so.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from architectures.factory import published_cfg
from augmentation.preprocessing import SMALL, Preprocessing, per_channel
from checkpointing.files import model_of, named
from checkpointing.folder import CONFIG_FILE
from checkpointing.published import is_published
from config import CHECKPOINT, DEFAULT, MODEL, Config, read_yaml
from config.channel_rules import COLOUR_DEFAULTS, has_colours
from errors import OptionError
from inference import read_content

log = logging.getLogger(__name__)

# Our options and the fields of Preprocessing.
_FIELDS = {
    "input_size": "input_size",
    "eval_crop_ratio": "crop_ratio",
    "crop_mode": "crop_mode",
    "interpolation": "interpolation",
    "mean": "mean",
    "std": "std",
    "background": "background",
    "in_chans": "channels",
    "bit_depth": "bit_depth",
}


def with_options_of_weights(config: Config, folder: Path | None = None) -> Config:
    """``config`` with what is left open about the images as the weights were trained.

    These are the weights of ``--pretrained``, ``--finetune``, or of an ``--eval`` of published
    ones. A run that goes on needs them no more: a checkpoint has its options in it, and so has the
    ``folder`` that ``--resume auto`` goes on in. Plug-ins must be imported.

    Raises:
        OptionError: an unknown model.
        CheckpointError: a file that can't be read.
    """
    left_open = [name for name in _FIELDS if config.origin[name] == DEFAULT]
    known = _options_of_weights(config, folder) if left_open else {}
    values = {name: known[name] for name in left_open if name in known}
    if not values:
        return config
    channels = values.get("in_chans", config.model.in_chans)
    for name in ("mean", "std"):
        if values.get(name):
            values[name] = list(per_channel(values[name], channels))
    # A recipe for colours says nothing of images without.
    if not has_colours(channels, values.get("bit_depth", config.data.bit_depth)):
        values |= {n: None for n in COLOUR_DEFAULTS if config.origin[n] == DEFAULT}
    return config.replace(MODEL, **values)


def _options_of_weights(config: Config, folder: Path | None) -> dict[str, Any]:
    resume, file = config.run.resume, config.model.finetune
    if resume and config.run.eval:
        file = resume
    elif resume not in ("", "auto"):
        return {}
    if file == "auto" or not (file or config.model.pretrained):
        return {}
    if resume == "auto" and folder is not None and (folder / CONFIG_FILE).is_file():
        return read_yaml(folder / CONFIG_FILE)[-1][1]
    if file == resume and CHECKPOINT in config.origin.values() and not is_published(file):
        return {}  # its options are here already, and need not be read again
    content = read_content(file, weights=False) if file else {}
    if file == resume and model_of(content) and not is_published(file):
        return {}
    if "preprocessing" in content:
        with named(file):
            trained = Preprocessing.from_dict(content["preprocessing"])
    else:
        cfg = published_cfg(config.model.model)
        if config.run.eval:
            _note_test_size(config.model.model, cfg)
        trained = Preprocessing.of_model(cfg)
    return {name: getattr(trained, field) for name, field in _FIELDS.items()}


def _note_test_size(name: str, cfg: Mapping[str, Any]) -> None:
    """Say where the published figure was measured at another size than that of training."""
    size, crop = cfg.get("test_input_size") or cfg["input_size"], cfg.get("test_crop_pct")
    crop = crop or cfg["crop_pct"]
    if (size, crop) != (cfg["input_size"], cfg["crop_pct"]):
        log.info(
            "the published figure of %s is at --input-size %s --eval-crop-ratio %g",
            name,
            " ".join(map(str, dict.fromkeys(size[1:]))),
            crop,
        )


def asked_preprocessing(config: Config, trained: Preprocessing) -> Preprocessing:
    """The preprocessing a model was ``trained`` with, but for what was asked for beside it."""
    values, channels = config.flat(), trained.channels
    if "in_chans" in config.explicit() and config.model.in_chans != channels:
        raise OptionError("in_chans", f"the model takes images of {channels}: leave it out")
    changes = {
        field: per_channel(values[name], channels) if name in ("mean", "std") else values[name]
        for name, field in _FIELDS.items()
        if name != "in_chans"
        and config.origin[name] not in (DEFAULT, MODEL, CHECKPOINT)
        and values[name] is not None
    }
    return dataclasses.replace(trained, **changes)


def evaluation_crop_ratio(config: Config) -> float:
    """``--eval-crop-ratio``; 1 for small images unless another one is asked for: all of such an
    image is looked at, as in DeiT."""
    ratio = config.data.eval_crop_ratio
    asked = config.origin["eval_crop_ratio"] == MODEL or "eval_crop_ratio" in config.explicit()
    return ratio if asked or max(config.model.size) > SMALL else 1.0
