"""Folders and files of other libraries: models of timm's hub form and of transformers, pipelines of
albumentations; layers with adapters, and words that go to timm's classes."""

import contextlib
import functools
import importlib.util
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import config
import inference
import models
from architectures.hub import refuse_enormous
from augmentation.own import Albumentations
from augmentation.preprocessing import Preprocessing
from checkpointing.digest import save_safetensors
from checkpointing.files import load_checkpoint
from checkpointing.published import read_published
from checkpointing.variants import variant_of
from optimization.optimizer import build_optimizer
from tools.hub.folder import CONFIG, WEIGHTS
from tools.torture.targets import Target
from tools.torture.targets.mutation import changed, mutated_text, odd_text, odd_value

_SIDE = 8
_MODEL = "deit_nano_patch4_32"
_ENDINGS = (CONFIG, "preprocessor_config.json")


# --- folders of models ----------------------------------------------------------------------------


def _hub_config() -> dict[str, Any]:
    return {
        "architecture": _MODEL,
        "num_classes": 2,
        "num_features": 64,
        "label_names": ["cat", "dog"],
        "model_args": {"img_size": _SIDE},
        "pretrained_cfg": {
            "input_size": [3, _SIDE, _SIDE],
            "num_classes": 2,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "notes": ["task: multilabel", "thresholds: [0.5, 0.25]"],
        },
    }


def _vit_config() -> dict[str, Any]:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": _SIDE,
        "patch_size": 4,
        "num_channels": 3,
        "num_hidden_layers": 1,
        "hidden_act": "gelu",
        "id2label": {"0": "cat", "1": "dog"},
        "label2id": {"cat": 0, "dog": 1},
        **sizes,
    }


def _processor() -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": {"height": _SIDE, "width": _SIDE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


_ODD_KEYS = ("auto_map", "crop_size", "crop_pct", "global_pool", "fixed_input_size", "url", "depth")


def _descriptions(valid: dict[str, Any], rng: random.Random) -> bytes:
    """A JSON file that goes wrong: as a text, or in what it holds."""
    if rng.random() < 0.2:
        return mutated_text(rng, [json.dumps(valid)]).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.15 and isinstance(valid, dict):
            valid = {**valid, rng.choice(_ODD_KEYS): odd_value(rng, 2)}
        valid = changed(rng, valid)
    return json.dumps(valid).encode("utf-8", "replace")


def _hub_folder(rng: random.Random) -> bytes:
    return _descriptions(_hub_config(), rng)


@functools.cache
def _weights(kind: str) -> bytes:
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / WEIGHTS
        if kind == "hub":
            model = models.build_model(_MODEL, 2, input_size=_SIDE)
            save_safetensors(path, model.state_dict(), {})
        else:
            (path.parent / CONFIG).write_text(json.dumps(_vit_config()))
            model = models.build_model(f"transformers/{temporary}", 2, input_size=_SIDE)
            weights = model.state_dict()
            save_safetensors(path, {k.removeprefix("model."): v for k, v in weights.items()}, {})
        return path.read_bytes()


@contextlib.contextmanager
def _new(folder: Path) -> Any:
    """A folder whose name was never used: libraries keep what they have read of one."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield Path(place)


def _read_hub_folder(content: bytes, folder: Path) -> None:
    with _new(folder) as place:
        (place / CONFIG).write_bytes(content)
        (place / WEIGHTS).write_bytes(_weights("hub"))
        classifier = inference.load_for_inference(place)
        assert len(classifier.class_names) == classifier.model.num_classes
        image = Image.new("RGB", (9, 9))
        logits = classifier.model(classifier.transform(image)[None])
        assert logits.shape == (1, len(classifier.class_names))


def _build_hub_folder(content: bytes, folder: Path) -> None:
    """As ``--model local-dir:FOLDER`` does, without weights."""
    with _new(folder) as place:
        (place / CONFIG).write_bytes(content)
        models.build_model(f"local-dir:{place}", 3)


def _transformers_folder(rng: random.Random) -> tuple[bytes, bytes]:
    """Its configuration and its processor's."""
    if rng.random() < 0.6:
        return _descriptions(_vit_config(), rng), json.dumps(_processor()).encode()
    return json.dumps(_vit_config()).encode(), _descriptions(_processor(), rng)


def _read_transformers_folder(given: tuple[bytes, bytes], folder: Path) -> None:
    with _new(folder) as place:
        for name, content in zip(_ENDINGS, given, strict=True):
            (place / name).write_bytes(content)
        (place / WEIGHTS).write_bytes(_weights("transformers"))
        found = read_published(f"transformers/{place}")
        Preprocessing.of_model(found.cfg)


def _build_transformers_folder(given: tuple[bytes, bytes], folder: Path) -> None:
    with _new(folder) as place:
        for name, content in zip(_ENDINGS, given, strict=True):
            (place / name).write_bytes(content)
        models.build_model(f"transformers/{place}", 3, input_size=_SIDE)


# --- adapters -------------------------------------------------------------------------------------


@functools.cache
def _adapted() -> dict[str, Any]:
    """A checkpoint whose head has an adapter."""
    with torch.random.fork_rng():
        model = models.build_model(_MODEL, 2, input_size=_SIDE)
    weights = dict(model.state_dict())
    weights["head.base_layer.weight"] = weights.pop("head.weight")
    weights["head.base_layer.bias"] = weights.pop("head.bias")
    features = weights["head.base_layer.weight"].shape[1]
    weights["head.lora_A.default.weight"] = torch.ones(2, features)
    weights["head.lora_B.default.weight"] = torch.ones(2, 2)
    options = {"model": _MODEL, "input_size": _SIDE, "lora": 2, "lora_alpha": 3.0}
    return {
        "model": weights,
        "config": config.resolve(options).recipe(),
        "class_names": ["cat", "dog"],
        "preprocessing": Preprocessing(_SIDE, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).to_dict(),
    }


def _odd_tensor(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return odd_value(rng, 1)
    shape = [rng.choice((0, 1, 2, 3, 64)) for _ in range(rng.randrange(4))]
    kinds = (torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64)
    return torch.zeros(shape, dtype=rng.choice(kinds))


def _adapters(rng: random.Random) -> dict[str, Any]:
    content = {**_adapted()}
    names = [n for n in content["model"] if n.startswith("head.")]
    for _ in range(rng.choice((1, 1, 2))):
        part = {n: content["model"].get(n, torch.zeros(2, 2)) for n in names}
        found = changed(rng, part, _odd_tensor)
        rest = {n: x for n, x in content["model"].items() if n not in names}
        content["model"] = {**rest, **found} if isinstance(found, dict) else rest
    if rng.random() < 0.3:
        name = rng.choice(("lora", "lora_alpha", "lora_targets"))
        content["config"] = {**content["config"], name: odd_value(rng, 1)}
    return content


def _read_adapters(content: dict[str, Any], folder: Path) -> None:
    path = folder / "checkpoint-0001.pth"
    torch.save(content, path)
    classifier = inference.from_content(load_checkpoint(path))
    assert classifier.model(torch.ones(1, 3, _SIDE, _SIDE)).shape == (1, 2)


# --- pipelines of albumentations ------------------------------------------------------------------


def _pipeline() -> dict[str, Any]:
    def step(name: str, **options: Any) -> dict[str, Any]:
        return {"__class_fullname__": name, "p": 1.0, **options}

    one_of = step("OneOf", transforms=[step("VerticalFlip"), step("Transpose")])
    steps = [
        step("HorizontalFlip"),
        step("RandomBrightnessContrast", brightness_limit=[-0.2, 0.2], contrast_limit=[-0.2, 0.2]),
        step("GaussianBlur", blur_limit=[3, 5], sigma_limit=[0.5, 3.0]),
        one_of,
        step("Affine", rotate=[-10.0, 10.0], fill=0),
    ]
    whole = step("Compose", transforms=steps, additional_targets={}, is_check_shapes=True)
    return {"__version__": "2.0.8", "transform": {**whole, "bbox_params": None}}


def _albumentations(rng: random.Random) -> bytes:
    """A pipeline as JSON, which is YAML too."""
    return _descriptions(_pipeline(), rng)


def _transform(content: bytes, folder: Path) -> None:
    path = folder / "pipeline.yaml"
    path.write_bytes(content)
    pipeline = Albumentations(str(path))
    image = Image.fromarray(np.arange(3 * _SIDE * _SIDE, dtype=np.uint8).reshape(_SIDE, _SIDE, 3))
    assert pipeline(image).size == image.size


# --- words ----------------------------------------------------------------------------------------

_MODEL_WORDS = ["depth=2", "num_heads=2", "qkv_bias=false", "mlp_ratio=2.0", "global_pool=avg"]
_MODEL_WORDS += ["class_token=true", "act_layer=relu", "embed_dim=32", "patch_size=4"]
_OPTIMIZERS = ("adamw", "sgd", "lamb", "adafactor", "lion", "rmsproptf", "nadamw", "lookahead_sgd")
_OPT_WORDS = ["eps=1e-8", "betas=(0.9, 0.99)", "nesterov=yes", "momentum=0.9", "weight_decay=0.1"]
_OPT_WORDS += ["decay_rate=0.5", "clip_threshold=1.0", "centered=true", "maximize=1", "lr=1"]


def _words(rng: random.Random) -> tuple[str, list[str]]:
    what = rng.choice(("model", *_OPTIMIZERS))
    known = _MODEL_WORDS if what == "model" else _OPT_WORDS
    words = [mutated_text(rng, known) for _ in range(rng.choice((1, 1, 2)))]
    names = [word.partition("=")[0] for word in known]
    odd = [f"{rng.choice(names)}={odd_text(rng)}" for _ in words]
    return what, [o if rng.random() < 0.3 else w for o, w in zip(odd, words, strict=True)]


def _take_words(given: tuple[str, list[str]], folder: Path) -> None:
    what, words = given
    if what == "model":
        options = config.resolve({"model": _MODEL, "model_kwargs": words}).recipe()
        variant = variant_of(options)
        # Who names a large model gets one.
        refuse_enormous({"depth": list(variant.arguments.values())}, "words")
        models.build_model(_MODEL, 2, input_size=_SIDE, variant=variant)
        return
    model = nn.Linear(2, 2)
    options = config.resolve({"opt": what, "opt_kwargs": words})
    build_optimizer(model, options.optim, lr=0.1)


_of_hub, _of_transformers = (functools.partial(_weights, k) for k in ("hub", "transformers"))
TARGETS = [
    Target("hub folders", _hub_folder, _read_hub_folder, prepare=_of_hub, share=0.05),
    Target("hub folders without weights", _hub_folder, _build_hub_folder, share=0.05),
    Target("adapters", _adapters, _read_adapters, share=0.1),
    Target("words of models and optimisers", _words, _take_words, share=0.2),
]
if importlib.util.find_spec("albumentations"):
    TARGETS.append(Target("pipelines", _albumentations, _transform, share=0.1))
if importlib.util.find_spec("transformers"):
    TARGETS += [
        Target(name, _transformers_folder, attack, prepare=_of_transformers, share=0.02)
        for name, attack in (
            ("transformers folders", _read_transformers_folder),
            ("transformers folders without weights", _build_transformers_folder),
        )
    ]
