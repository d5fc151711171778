"""Trained models loaded again: from checkpoints, from what is in memory, and what is refused."""

import copy

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import inference
from augmentation.transforms import Preprocessing
from checkpointing.files import save_checkpoint
from errors import CheckpointError
from models import build_model

NAMES = ["amber", "blue", "crimson"]
PREPROCESSING = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def content() -> dict:
    """What a training checkpoint holds for a user of the model; the average differs."""
    weights = build_model("deit_nano_patch4_32", 3, input_size=32).state_dict()
    return {
        "model": weights,
        "model_ema": {name: 0.5 * value for name, value in weights.items()},
        "config": {"model": "deit_nano_patch4_32"},
        "class_names": NAMES,
        "preprocessing": PREPROCESSING.to_dict(),
    }


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((40, 36), 60).convert("RGB")


def outputs(classifier: inference.Classifier, image: Image.Image) -> torch.Tensor:
    return classifier.model(classifier.transform(image)[None])


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_gives_its_model(content, image, tmp_path, ema):
    save_checkpoint(tmp_path / "best.pth", content)
    classifier = inference.load_for_inference(tmp_path / "best.pth", ema=ema)
    assert classifier.class_names == NAMES
    assert not classifier.model.training
    assert classifier.transform(image).shape == (3, 32, 32)
    model = build_model("deit_nano_patch4_32", 3, input_size=32).eval()
    model.load_state_dict(content["model_ema" if ema else "model"])
    x = classifier.transform(image)[None]
    assert torch.equal(classifier.model(x), model(x))


def test_safetensors_carry_what_describes_them(content, image, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(content["model"], path, inference.metadata_of(content))
    again = inference.load_for_inference(path)
    assert again.class_names == NAMES
    expected = outputs(inference.from_content(content), image)
    assert torch.equal(outputs(again, image), expected)
    save_file(content["model"], path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* holds no config"):
        inference.load_for_inference(path)


def test_metadata_is_read_back(content):
    read = inference.read_metadata(inference.metadata_of(content))
    assert read["config"] == {"model": "deit_nano_patch4_32"}
    assert read["class_names"] == NAMES
    assert Preprocessing.from_dict(read["preprocessing"]) == PREPROCESSING
    for foreign in ({}, {"config": "{", "class_names": "[]", "preprocessing": "{}"}):
        with pytest.raises(CheckpointError, match="doesn't carry class names"):
            inference.read_metadata(foreign)


def test_another_size_interpolates_the_position_embedding(content, image):
    larger = Preprocessing(48, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    classifier = inference.from_content(content, preprocessing=larger)
    assert classifier.model.pos_embed.shape[1] == 1 + 12 * 12
    assert torch.equal(classifier.model.head.weight, content["model"]["head.weight"])
    assert outputs(classifier, image).shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "holds no config"),
        ({"model_ema": None}, "no moving average"),
        ({"class_names": [*NAMES, "green"]}, "don't fit the model deit_nano_patch4_32"),
    ],
)
def test_what_cannot_be_used_is_refused(content, tmp_path, change, message):
    changed = copy.copy(content) | change
    if changed["config"] is None:
        del changed["config"]
    save_checkpoint(tmp_path / "x.pth", changed)
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{message}"):
        inference.load_for_inference(tmp_path / "x.pth", ema="model_ema" in change)


def test_an_onnx_file_has_one_set_of_weights(tmp_path):
    with pytest.raises(CheckpointError, match="leave --ema out"):
        inference.load_for_inference(tmp_path / "x.onnx", ema=True)
