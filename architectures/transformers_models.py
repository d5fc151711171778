"""Image classifiers of the transformers library: ``transformers/OWNER/NAME`` of the hub, or
``transformers/FOLDER`` with a ``config.json``.

The preprocessing is that of ``preprocessor_config.json``; a checkpoint of ours carries both, and
is opened without the hub.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import bounded
from architectures.first_conv import COLOURS
from architectures.hub import MOST_CONFIG, MOST_LAYERS, given_description, reached
from architectures.library_model import TRANSFORMERS, LibraryModel, classifier_of, first_conv_of
from architectures.registry import plain_cfg
from errors import CheckpointError, OptionError, first_line, printable, shown

ARCHITECTURE = "transformers"
"""What a description of such a model has in place of timm's architecture."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Of a configuration: names and places, which building needs not, and code from elsewhere.
_NOT_KEPT = ("id2label", "label2id", "_name_or_path", "auto_map", "dtype", "torch_dtype")
_NOT_KEPT += ("architectures", "transformers_version", "name_or_path")
# They interpolate their positions to each image, and take those of their own for a square.
_INTERPOLATING = ("beit", "data2vec-vision", "dinov2", "dinov2_with_registers")


def resolve(name: str) -> str:
    """``name``, of a folder its whole path. Raises OptionError without the library."""
    _library()
    if given_description(name) is not None:
        return name
    folder = Path(name.removeprefix(TRANSFORMERS)).expanduser()
    return TRANSFORMERS + str(folder.resolve()) if folder.is_dir() else name


def takes(name: str, argument: str, value: Any = None) -> bool:
    """Whether the model's configuration has ``argument``, by timm's name or its own."""
    own = _own_name(argument, _config(name))
    return own in keyword_names(name)


def keyword_names(name: str) -> list[str]:
    """The keywords of the model's configuration."""
    config = type(_config(name))()
    return sorted(key for key in config.to_dict() if not key.startswith("_"))


def build(name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The model without weights; ``arguments`` by timm's names or the configuration's."""
    transformers = _library()
    config = _config(name)
    _refuse_enormous(config.to_dict())
    for argument, value in arguments.items():
        own = _own_name(argument, config)
        rectangle = own == "image_size" and len(set(_two(value))) == 2
        if not (rectangle and config.model_type in _INTERPOLATING):
            setattr(config, own, value)
    config.num_labels = num_classes
    try:
        inner = transformers.AutoModelForImageClassification.from_config(config)
    except ValueError as error:
        raise OptionError(
            "model", f"{name} classifies no images ({first_line(error)}): name another"
        ) from None
    return TransformersModel(inner.float(), num_classes, published_cfg(name))


# Beside images there are vocabularies of 256,000 words, and constants of a million.
_MOST_NUMBER = 1_000_000
# How often something is repeated. Most names of the library say it like one of these.
_REPEATED = re.compile(r"^depths?$|layers?$|repeats$|per_block$|_num_blocks$|^(num|n)_.*blocks$")


def _refuse_enormous(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a configuration that would take hours to build."""
    for name, value in config.items():
        if name in ("id2label", "label2id"):
            continue
        if isinstance(value, Mapping):
            _refuse_enormous(value)
            continue
        numbers = _numbers(value)
        repeated = sum(max(number, 1) for number in numbers) if _REPEATED.search(name) else 0
        if repeated > MOST_LAYERS or max(numbers, default=0) > _MOST_NUMBER:
            most = MOST_LAYERS if repeated else _MOST_NUMBER
            raise CheckpointError(
                f"its config.json asks for {printable(shown(name))} of more than {most:,}"
            )


def _numbers(value: Any) -> list[float]:
    """The sizes of all numbers in ``value``, at any depth."""
    if isinstance(value, list | tuple):
        return [number for each in value for number in _numbers(each)]
    return [abs(value)] if isinstance(value, int | float) else []


class TransformersModel(LibraryModel):
    """(B, C, H, W) images to (B, classes) logits, where the library answers with a record."""

    def __init__(self, model: nn.Module, num_classes: int, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        channels = getattr(model.config, "num_channels", COLOURS)
        self.pretrained_cfg = {
            **cfg,
            "classifier": classifier_of(self, num_classes),
            "first_conv": first_conv_of(self, channels),
        }

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images, return_dict=False)[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass. Raises AttributeError where it can't."""
        if not self.model.supports_gradient_checkpointing:
            raise AttributeError("no gradient checkpointing")
        if enable:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The library's own state dict by the names of :class:`TransformersModel`."""
    own = model.state_dict()
    return {name if name in own else f"model.{name}": value for name, value in state_dict.items()}


def published_cfg(name: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of the model, from its configuration and image processor."""
    if (found := given_description(name)) is not None:
        return plain_cfg(224, "head") | dict(found["pretrained_cfg"]) | {"architecture": name}
    config = _config(name)
    labels = [config.id2label[i] for i in sorted(config.id2label)]
    sides = _two(getattr(config, "image_size", None) or 224)
    cfg = plain_cfg(224, "classifier") | {
        "architecture": name,
        "source": ARCHITECTURE,
        "num_classes": len(labels),
        "label_names": None if labels == [f"LABEL_{i}" for i in range(len(labels))] else labels,
        "input_size": (3, *sides),
    }
    if _has_weights(name):
        cfg["file"] = name.removeprefix(TRANSFORMERS)
    return cfg | _preprocessing(name, cfg["input_size"])


def _has_weights(name: str) -> bool:
    """Whether there are weights beside the configuration; of the hub there are."""
    folder = Path(name.removeprefix(TRANSFORMERS))
    return not folder.is_dir() or any(
        path.suffix in (".safetensors", ".bin") for path in folder.iterdir()
    )


def published_weights(name: str) -> dict[str, Tensor]:
    """The state dict of the model's own weights, of the hub downloaded once. Raises OSError."""
    transformers = _library()
    with reached(name):
        model = transformers.AutoModelForImageClassification.from_pretrained(
            name.removeprefix(TRANSFORMERS)
        )
    return {f"model.{key}": value for key, value in model.float().state_dict().items()}


def description(name: str) -> dict[str, Any]:
    """What rebuilds the model without its folder or the hub, as plain values."""
    if (found := given_description(name)) is not None:
        return dict(found)
    config = _config(name)
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_KEPT}
    cfg = published_cfg(name)
    kept = {k: v for k, v in cfg.items() if k not in ("label_names", "file", "source")}
    return json.loads(
        json.dumps(
            {
                "architecture": ARCHITECTURE,
                "model_args": {"model_type": config.model_type, **values},
                "pretrained_cfg": kept,
            },
            default=str,
        )
    )


# --- reading the library's files ------------------------------------------------------------------


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "model", f"transformers/ needs that library ({error}): pip install transformers"
        ) from None
    transformers.logging.disable_progress_bar()
    return transformers


def _config(name: str) -> Any:
    """A fresh configuration, which may be changed."""
    transformers = _library()
    if (found := given_description(name)) is not None:
        values = dict(found["model_args"])
        kind = values.pop("model_type", "")
        return transformers.AutoConfig.for_model(kind, **values)
    return type(_read(name)).from_dict(_read(name).to_dict())


@functools.cache
def _read(name: str) -> Any:
    """The configuration in a folder or of the hub. Raises OSError."""
    transformers = _library()
    folder = Path(name.removeprefix(TRANSFORMERS))
    if folder.is_dir():
        bounded.check(folder / "config.json", MOST_CONFIG)
    try:
        with reached(name):
            return transformers.AutoConfig.from_pretrained(name.removeprefix(TRANSFORMERS))
    except ValueError as error:
        raise OptionError("model", f"{name} can't be read: {first_line(error)}") from None


def _own_name(argument: str, config: Any) -> str:
    """The configuration's name for an argument of timm's."""
    known = {
        "img_size": ("image_size",),
        "in_chans": ("num_channels",),
        "drop_rate": ("hidden_dropout_prob", "hidden_dropout"),
        "drop_path_rate": ("drop_path_rate", "stochastic_depth_prob"),
    }
    names = known.get(argument, (argument,))
    return next((own for own in names if hasattr(config, own)), names[0])


def _preprocessing(name: str, input_size: tuple[int, ...]) -> dict[str, Any]:
    """What the image processor does, in the terms of a ``pretrained_cfg``; none: nothing known."""
    transformers = _library()
    try:
        with reached(name):
            found = transformers.AutoImageProcessor.from_pretrained(
                name.removeprefix(TRANSFORMERS)
            ).to_dict()
    except (OSError, ValueError):
        return {}
    _, height, width = input_size
    factor = 255 * (found.get("rescale_factor") or 1 / 255)
    normalised = found.get("do_normalize", True)
    mean = found.get("image_mean") or (0.0,) * 3 if normalised else (0.0,) * 3
    std = found.get("image_std") or (1.0,) * 3 if normalised else (1.0,) * 3
    size, crop = found.get("size") or {}, found.get("crop_size")
    short = size.get("shortest_edge")
    cfg: dict[str, Any] = {"crop_mode": "squash", "crop_pct": 1.0}
    if crop and found.get("do_center_crop"):
        height, width = _two(crop)
        cfg = {"crop_mode": "center", "crop_pct": min(height, width) / (short or min(_two(size)))}
    elif short and found.get("crop_pct") and short < 384:  # ConvNeXt's processor
        height = width = short
        cfg = {"crop_mode": "center", "crop_pct": found["crop_pct"]}
    elif size:
        height, width = (short, short) if short else _two(size)
    return cfg | {
        "input_size": (3, height, width),
        "interpolation": _FILTERS.get(found.get("resample", 2), "bilinear"),
        "mean": tuple(x / factor for x in mean),
        "std": tuple(x / factor for x in std),
    }


def _two(size: Any) -> tuple[int, int]:
    """Height and width of a size as the library's files have it."""
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        return (side, side) if side else (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])
