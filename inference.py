"""Trained models: evaluation, prediction, export and serving all load them here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from architectures.weights import load_pretrained_weights
from augmentation.transforms import EvalTransform, Preprocessing
from checkpointing.files import load_checkpoint, model_of, named, weights_of
from checkpointing.form import wrong_form
from checkpointing.published import FOLDER, HUB, Published, is_published, read_published
from errors import CheckpointError, OptionError, UserError, first_line, first_names
from pipeline import imagenet
from pipeline.decoding import decode, naming_lack_of_memory


class Classifier(NamedTuple):
    """A trained model and what is needed to use it."""

    model: nn.Module
    """(B, 3, H, W) normalised images to (B, C) logits; in evaluation mode."""
    transform: "ImageTransform"
    """A path, bytes, binary file, Pillow image of any mode, or array to (3, H, W), as in the
    evaluation of training. Raises BadImageError."""
    class_names: list[str]
    """C names."""


class ImageTransform(EvalTransform):
    """Any image as the model takes it: (3, S, S) float32, normalised.

    A call decodes what ``pipeline.decoding.decode`` takes, as every command does, and raises
    BadImageError. ``apply`` takes decoded images, as in every data set.
    """

    def __call__(self, image: Any) -> Tensor:
        image = decode(image, self.background)
        with naming_lack_of_memory():
            return super().__call__(image)


def load_for_inference(
    path: str | Path, *, device: torch.device | str = "cpu", ema: bool = False
) -> Classifier:
    """The model of a checkpoint, of an exported ``.onnx`` or ``.safetensors`` file, or a published
    one (``timm/NAME``, ``hf-hub:OWNER/NAME``, a folder in timm's hub form).

    Args:
        path: file, folder, name or, of a checkpoint, https URL.
        device: where the model is to be.
        ema: take the moving average of the weights.

    Raises:
        CheckpointError: it can't be read or fetched, or holds weights alone, or no average.
    """
    with named(path):
        if Path(str(path)).suffix == ".onnx":
            if ema:
                raise CheckpointError("an ONNX file holds one set of weights: leave --ema out")
            return _from_onnx(Path(path).expanduser(), torch.device(device))
        return from_content(read_content(path), device=device, ema=ema)


def read_content(path: str | Path, *, weights: bool = True) -> dict[str, Any]:
    """What a checkpoint holds; exported safetensors files and published models look like one with
    less in it. Without ``weights`` those of files aren't read. Raises CheckpointError."""
    if is_published(path):
        return _as_checkpoint(read_published(path))
    content = load_checkpoint(path, weights=weights)
    if Path(str(path)).suffix != ".safetensors" or "://" in str(path):
        return content
    from safetensors import safe_open

    with safe_open(Path(path).expanduser(), "pt") as file:
        metadata = file.metadata() or {}
    return {"model": content, **read_metadata(metadata)} if "preprocessing" in metadata else content


def _as_checkpoint(published: Published) -> dict[str, Any]:
    try:
        preprocessing = Preprocessing.of_model(published.cfg)
    except OptionError as error:
        raise CheckpointError(error.message) from None
    return {
        "model": published.weights,
        "config": {"model": published.name},
        "class_names": _class_names(published),
        "preprocessing": preprocessing.to_dict(),
    }


def _class_names(published: Published) -> list[str]:
    """Those that come with the weights, else ImageNet's by their number, else "class 0" …"""
    count, given = published.cfg["num_classes"], published.cfg.get("label_names")
    if not given:
        return list(imagenet.class_names(count) or unnamed(count))
    if isinstance(given, Mapping):  # by number, which may have gaps
        given = [given.get(str(i), f"class {i}") for i in range(count)]
    if len(given) != count:
        raise CheckpointError(
            f"{published.name} has {count} classes and {len(given)} label_names: correct them in "
            "its config.json"
        )
    return list(map(str, given))


def unnamed(num_classes: int) -> list[str]:
    """What the classes of a published model are called where nothing is known of their names."""
    return [f"class {i}" for i in range(num_classes)]


def metadata_of(content: Mapping[str, Any]) -> dict[str, str]:
    """What exported files carry beside the weights: text by name, each value as JSON."""
    values = {
        "config": {"model": content["config"]["model"]},
        "class_names": list(content["class_names"]),
        "preprocessing": Preprocessing.from_dict(content["preprocessing"]).exported(),
    }
    return {name: json.dumps(value) for name, value in values.items()}


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of :func:`metadata_of`. Raises CheckpointError for a file of another origin."""
    try:
        found = {name: json.loads(metadata[name]) for name in _METADATA}
    except (KeyError, json.JSONDecodeError):
        raise CheckpointError(
            "the file doesn't carry class names and preprocessing: export it with "
            "python -m tools.export"
        ) from None
    if problem := wrong_form(found):
        raise CheckpointError(f"{problem}: export it with python -m tools.export")
    return found


_METADATA = ("config", "class_names", "preprocessing")


class OnnxModel(nn.Module):
    """An ONNX file as a module: (B, 3, H, W) images to (B, C) logits on the same device.

    Raises CheckpointError for a file that isn't ONNX, UserError without onnxruntime.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"{path} needs onnxruntime ({error}): pip install -r requirements-tools.txt"
            ) from None
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        cuda = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        available = onnxruntime.get_available_providers()
        providers = [p for p in (*cuda, "CPUExecutionProvider") if p in available]
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers)
        except Exception as error:  # onnxruntime raises types of its own for each kind of damage
            raise CheckpointError(f"{path} can't be read as ONNX: {first_line(error)}") from None
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.input = self.session.get_inputs()[0]

    def forward(self, images: Tensor) -> Tensor:
        # A number is how many images the file takes at a time; a free one has a name.
        fixed = self.input.shape[0]
        size = fixed if isinstance(fixed, int) else max(1, len(images))
        chunks = images.detach().cpu().split(size)
        answers = [self.session.run(None, {self.input.name: x.numpy()})[0] for x in chunks]
        return torch.cat([torch.from_numpy(x) for x in answers]).to(images.device)


def _from_onnx(path: Path, device: torch.device) -> Classifier:
    model = OnnxModel(path, device).eval()
    content = read_metadata(model.metadata)
    preprocessing = Preprocessing.from_dict(content["preprocessing"])
    return Classifier(model, ImageTransform(preprocessing), content["class_names"])


def from_content(
    content: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    ema: bool = False,
    preprocessing: Preprocessing | None = None,
) -> Classifier:
    """As :func:`load_for_inference`, from a checkpoint already in memory.

    Another ``preprocessing`` than the checkpoint's may ask for another input size: position
    embeddings are then interpolated.
    """
    missing = [k for k in _METADATA if content.get(k) is None]
    if missing:
        raise CheckpointError(
            f"the checkpoint holds no {', '.join(missing)}, it is not a training checkpoint of "
            "this project: take its weights over with --finetune"
        )
    options, class_names = content["config"], list(content["class_names"])
    if model_of(content) is None:
        raise CheckpointError("its config names no model: take its weights over with --finetune")
    trained = Preprocessing.from_dict(content["preprocessing"])
    preprocessing = preprocessing or trained
    model = _build(options["model"], len(class_names), preprocessing.input_size)
    weights = weights_of(content, ema=ema)
    if preprocessing.input_size != trained.input_size:
        report = load_pretrained_weights(model, weights)
        if report.missing:
            raise CheckpointError(f"the weights lack {first_names(report.missing)}")
        weights = model.state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(
            f"the weights don't fit the model {options['model']}: {reason}"
        ) from None
    model.to(device).eval()
    return Classifier(model, ImageTransform(preprocessing), class_names)


def _build(name: str, num_classes: int, input_size: int) -> nn.Module:
    """The architecture, without weights."""
    try:
        return models.build_model(
            name, num_classes, input_size=input_size, required=("input_size",)
        )
    except OptionError as error:
        if not name.startswith((HUB, FOLDER)) or error.option != "model":
            raise
        raise CheckpointError(
            f"the weights are here, but the architecture is read from the config.json of {name}: "
            f"{error.message}"
        ) from None
