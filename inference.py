"""Trained models: evaluation, prediction, export and serving all load them here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from architectures.hub import FOLDER, HUB, built_by, refuse_enormous, unasked
from architectures.library_model import TRANSFORMERS
from architectures.variant import Variant
from architectures.weights import load_pretrained_weights
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import RGB
from augmentation.transforms import EvalTransform
from checkpointing.files import (
    CLASSIFICATION,
    load_checkpoint,
    model_of,
    named,
    safetensors_metadata,
    task_of,
    thresholds_of,
    weights_of,
)
from checkpointing.form import wrong_form
from checkpointing.published import Published, is_published, label_names, read_published
from checkpointing.task_notes import noted_task
from checkpointing.variants import FORM_OPTIONS, form_options, saved_variant
from errors import CheckpointError, OptionError, UserError, first_line, first_names, printable
from pipeline import imagenet
from pipeline.bands import decode_bands
from pipeline.decoding import decode, naming_lack_of_memory


@dataclass(frozen=True)
class Classifier:
    """A trained model and what is needed to use it. Unpacks to model, transform, class names."""

    model: nn.Module
    """(B, 3, H, W) normalised images to (B, C) logits; in evaluation mode."""
    transform: "ImageTransform"
    """A path, bytes, binary file, Pillow image of any mode, or array to (3, H, W), as in the
    evaluation of training. Raises BadImageError."""
    class_names: list[str]
    """C names."""
    task: str = "classification"
    """"classification", or "multilabel": each logit's sigmoid is the probability of its label."""
    thresholds: tuple[float, ...] | None = None
    """Of a multi-label model, C probabilities from which a label counts as there, the best of
    validation; None: 0.5."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.transform, self.class_names))


class ImageTransform(EvalTransform):
    """Any image as the model takes it: (C, H, W) float32, normalised.

    A call decodes what ``pipeline.decoding.decode`` takes, as every command does, and raises
    BadImageError. ``apply`` takes decoded images, as in every data set.
    """

    def __call__(self, image: Any) -> Tensor:
        if self.form == RGB:
            image = decode(image, self.background)
        else:
            image = decode_bands(image, self.form, self.background)
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
    metadata = safetensors_metadata(Path(path).expanduser())
    return {"model": content, **read_metadata(metadata)} if "preprocessing" in metadata else content


def _as_checkpoint(published: Published) -> dict[str, Any]:
    try:
        preprocessing = Preprocessing.of_model(published.cfg)
        noted = noted_task(published.cfg)
    except OptionError as error:
        raise CheckpointError(error.message) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"its config.json is odd: {printable(first_line(error))}") from None
    return {
        "model": published.weights,
        "config": {"model": published.name, **({"task": noted["task"]} if noted else {})},
        "thresholds": noted.get("thresholds"),
        "class_names": _class_names(published),
        "preprocessing": preprocessing.to_dict(),
        "hub_config": published.description,
    }


def _class_names(published: Published) -> list[str]:
    """Those that come with the weights, else ImageNet's by their number, else "class 0" …"""
    count = published.cfg["num_classes"]
    return label_names(published.cfg) or list(imagenet.class_names(count) or unnamed(count))


def unnamed(num_classes: int) -> list[str]:
    """What the classes of a published model are called where nothing is known of their names."""
    return [f"class {i}" for i in range(num_classes)]


def metadata_of(content: Mapping[str, Any]) -> dict[str, str]:
    """What exported files carry beside the weights: text by name, each value as JSON."""
    values: dict[str, Any] = {
        "config": {"model": content["config"]["model"], **form_options(content["config"])},
        "class_names": list(content["class_names"]),
        "preprocessing": Preprocessing.from_dict(content["preprocessing"]).exported(),
    }
    task = task_of(content)
    if task != CLASSIFICATION:
        values["config"]["task"] = task
    for name in _OPTIONAL:
        if content.get(name):
            values[name] = content[name]
    return {name: json.dumps(value) for name, value in values.items()}


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of :func:`metadata_of`. Raises CheckpointError for a file of another origin."""
    try:
        named = (*_METADATA, *(name for name in _OPTIONAL if name in metadata))
        found = {name: json.loads(metadata[name]) for name in named}
    except (KeyError, ValueError, RecursionError):
        found = {}
    if None in (found.get(name) for name in _METADATA):
        raise CheckpointError(
            "the file doesn't carry class names and preprocessing: export it with "
            "python -m tools.export"
        ) from None
    if problem := wrong_form(found):
        raise CheckpointError(f"{problem}: export it with python -m tools.export")
    return found


_METADATA = ("config", "class_names", "preprocessing")
_OPTIONAL = ("hub_config", "thresholds")


class OnnxModel(nn.Module):
    """An ONNX file as a module: (B, 3, H, W) images to (B, C) logits on the same device.

    Files of one such input and output of float32 are taken; of a fixed number of images too: the
    last ones are filled up with zeros. A call raises CheckpointError where the file can't answer,
    or its answers are of another shape.

    Args:
        path: the file.
        device: of the images, where onnxruntime has it.

    Raises:
        CheckpointError: it isn't ONNX, carries no class names and preprocessing, or its input or
            output is another one than they say.
        UserError: without onnxruntime.
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
            raise CheckpointError(f"{path} does not exist, or is no file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # fatal: what is refused comes as an error
        cuda = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        available = onnxruntime.get_available_providers()
        providers = [p for p in (*cuda, "CPUExecutionProvider") if p in available]
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers)
        except Exception as error:  # onnxruntime raises types of its own for each kind of damage
            reason = printable(first_line(error))
            raise CheckpointError(f"{path} can't be read as ONNX: {reason}") from None
        self.content = read_metadata(self.session.get_modelmeta().custom_metadata_map)
        preprocessing = Preprocessing.from_dict(self.content["preprocessing"])
        self.shape = (preprocessing.channels, *preprocessing.size)
        self.num_classes = len(self.content["class_names"])
        self.input = self._only("input", self.session.get_inputs(), self.shape)
        self._only("output", self.session.get_outputs(), (self.num_classes,))

    def _only(self, what: str, found: Sequence[Any], shape: tuple[int, ...]) -> Any:
        """The one input or output there may be, of (B, *shape). Raises CheckpointError."""
        if len(found) != 1:
            raise CheckpointError(f"the model has {len(found)} {what}s: export it with one")
        [only] = found
        # What isn't known before it runs is a name, or None.
        pairs = zip(only.shape[1:], shape, strict=False)
        fits = len(only.shape) == 1 + len(shape) and all(
            n == wanted for n, wanted in pairs if isinstance(n, int)
        )
        if only.type != "tensor(float)" or (only.shape and not fits):
            given = " × ".join(str(n) if isinstance(n, int) else "N" for n in only.shape)
            raise CheckpointError(
                f"the model's {what} is {only.type} of {given}, and its class names and "
                f"preprocessing mean tensor(float) of N × {' × '.join(map(str, shape))}: export it "
                "with python -m tools.export"
            )
        return only

    def forward(self, images: Tensor) -> Tensor:
        fixed = self.input.shape[0] if self.input.shape else None
        size = fixed if isinstance(fixed, int) and fixed > 0 else max(1, len(images))
        chunks = images.detach().float().cpu().split(size)
        answers = [self._answers(chunk, size if size == fixed else len(chunk)) for chunk in chunks]
        return torch.cat(answers).to(images.device)

    def _answers(self, images: Tensor, size: int) -> Tensor:
        """(B, C), from a call with ``size`` images."""
        filled = torch.cat((images, images.new_zeros(size - len(images), *images.shape[1:])))
        try:
            [logits] = self.session.run(None, {self.input.name: filled.numpy()})
        except Exception as error:  # onnxruntime raises types of its own
            reason = printable(first_line(error))
            raise CheckpointError(f"the ONNX model can't answer: {reason}") from None
        if logits.shape != (size, self.num_classes):
            given = " × ".join(map(str, logits.shape))
            raise CheckpointError(
                f"the ONNX model answers {size} images of {self.num_classes} classes with {given} "
                "numbers: export it with python -m tools.export"
            )
        return torch.from_numpy(logits)[: len(images)]


def _from_onnx(path: Path, device: torch.device) -> Classifier:
    model = OnnxModel(path, device).eval()
    preprocessing = Preprocessing.from_dict(model.content["preprocessing"])
    names = list(model.content["class_names"])
    return Classifier(
        model,
        ImageTransform(preprocessing),
        names,
        task_of(model.content),
        thresholds_of(model.content),
    )


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
    if problem := wrong_form(content):
        raise CheckpointError(f"{problem}: take its weights over with --finetune")
    options, class_names = content["config"], list(content["class_names"])
    if model_of(content) is None:
        raise CheckpointError("its config names no model: take its weights over with --finetune")
    trained = Preprocessing.from_dict(content["preprocessing"])
    preprocessing = preprocessing or trained
    weights = weights_of(content, ema=ema)
    name, variant = options["model"], saved_variant(content)
    refuse_enormous(variant.arguments, "model_kwargs")
    with built_by(name, content.get("hub_config")), unasked([name]):
        _check_fit(name, len(class_names), trained, weights, variant)
        model = _build(name, len(class_names), preprocessing, variant)
    if preprocessing.input_size != trained.input_size:
        report = load_pretrained_weights(model, weights, size=trained.input_size)
        if report.missing:
            raise CheckpointError(f"the weights lack {first_names(report.missing)}")
        weights = model.state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = (lines[1:] or lines)[0].strip()
        raise CheckpointError(
            f"the weights don't fit the model {options['model']}: {reason}"
        ) from None
    model.to(device).eval()
    return Classifier(
        model,
        ImageTransform(preprocessing),
        class_names,
        task_of(content),
        thresholds_of(content, ema=ema),
    )


def _check_fit(
    name: str,
    num_classes: int,
    trained: Preprocessing,
    weights: Mapping[str, Tensor],
    variant: Variant,
) -> None:
    """Raise CheckpointError if ``weights`` are not those of a model, before there is memory for it.

    Names and sizes in a file may be any.
    """
    try:
        with torch.device("meta"):
            own = _build(name, num_classes, trained, variant).state_dict()
    except UserError:
        raise
    except Exception:  # a model whose making looks at values: loading compares the rest
        return
    for key, x in own.items():
        given = weights.get(key)
        if given is None:
            problem = f"{key} is missing"
        elif given.shape != x.shape:
            problem = f"{key} is {_shape(given)}, not {_shape(x)}"
        elif x.is_floating_point() and not given.is_floating_point():
            problem = f"{key} is of {_kind(given)}, not of {_kind(x)}"
        else:
            continue
        raise CheckpointError(f"the weights don't fit the model {name}: {problem}")


def _shape(x: Tensor) -> str:
    return " × ".join(map(str, x.shape)) or "one number"


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _build(
    name: str, num_classes: int, preprocessing: Preprocessing, variant: Variant
) -> nn.Module:
    """The architecture, without weights."""
    try:
        return models.build_model(
            name,
            num_classes,
            input_size=preprocessing.input_size,
            in_chans=preprocessing.channels,
            required=("input_size",),
            variant=variant,
        )
    except OptionError as error:
        if error.option in FORM_OPTIONS:
            raise CheckpointError(f"its {error.option}: {error.message}") from None
        if not name.startswith((HUB, FOLDER, TRANSFORMERS)) or error.option != "model":
            raise
        raise CheckpointError(
            f"the weights are here, but the architecture is read from the config.json of {name}: "
            f"{error.message}"
        ) from None
