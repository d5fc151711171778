"""Models of the transformers library from a folder, offline.

Also of architectures/libraries.py.
"""

import json
import shutil

import pytest
import torch
import transformers
from timm.models import adapt_input_conv

import inference
import models
from architectures.hub import built_by
from architectures.libraries import description
from errors import CheckpointError
from tests.runs import newest, train

LABELS = {0: "amber", 1: "blue", 2: "crimson"}


@pytest.fixture
def folder(tmp_path):
    """A tiny ViT with its weights and preprocessing."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
        id2label=LABELS,
    )
    path = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(path)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3)
    processor.save_pretrained(path)
    return path


def test_published_folder_answers_as_the_library(folder) -> None:
    twin = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    content = inference.read_content(f"transformers/{folder}")
    own = inference.from_content(content)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(own.model(images), twin(images).logits)
    assert own.class_names == list(LABELS.values())
    preprocessing = content["preprocessing"]
    assert (preprocessing["crop_mode"], preprocessing["interpolation"]) == ("squash", "bicubic")
    assert preprocessing["mean"] == pytest.approx([0.5, 0.5, 0.5])


def edited(folder, **values) -> str:
    """The model of ``folder`` with other values in its configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return f"transformers/{folder}"


@pytest.mark.parametrize(
    "name, value, most",
    [("num_hidden_layers", 10**6, "300"), ("intermediate_size", 10**9, "1,000,000")],
)
def test_a_configuration_of_hours_is_refused(folder, name, value, most) -> None:
    with pytest.raises(CheckpointError, match=f"asks for '{name}' of more than {most}"):
        models.build_model(edited(folder, **{name: value}), 3)


def test_many_classes_and_a_vocabulary_are_none_of_hours(folder) -> None:
    names = {f"class {i}": i for i in range(1000)}
    values = {"label2id": names, "id2label": {str(i): name for name, i in names.items()}}
    values["text_config"] = {"vocab_size": 256_000, "num_hidden_layers": 27}
    assert models.build_model(edited(folder, **values), 1000).num_classes == 1000


def test_weights_are_adapted_to_other_channels(folder) -> None:
    twin = transformers.AutoModelForImageClassification.from_pretrained(folder)
    name = f"transformers/{folder}"
    own = models.build_model(name, 3, input_size=16, in_chans=4, pretrained=True)
    first = "vit.embeddings.patch_embeddings.projection"
    old, new = (m.get_submodule(first).weight for m in (twin, own.model))
    assert torch.equal(new, adapt_input_conv(4, old))
    assert own(torch.randn(2, 4, 16, 16)).shape == (2, 3)


def test_weights_are_fitted_to_other_sizes(folder, tmp_path) -> None:
    """As the library does for images of another size, here not a square."""
    image = torch.randn(2, 3, 24, 16)
    twin = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    name = f"transformers/{folder}"
    own = models.build_model(name, 3, input_size=(24, 16), pretrained=True).eval()
    expected = twin(image, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(own(image), expected)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    twin = transformers.Dinov2ForImageClassification(config).eval()
    twin.save_pretrained(tmp_path / "dino")
    name = f"transformers/{tmp_path / 'dino'}"
    own = models.build_model(name, 2, input_size=(24, 16), pretrained=True).eval()
    assert torch.equal(own(image), twin(image).logits)


def test_description_rebuilds_it_without_the_folder(folder) -> None:
    name = f"transformers/{folder}"
    before, kept = models.build_model(name, 5, input_size=16), description(name)
    shutil.rmtree(folder)
    with built_by(name, kept):
        after = models.build_model(name, 5, input_size=16)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (before, after)]
    assert shapes[0] == shapes[1]


def test_checkpoint_of_a_run_needs_no_folder(folder, images, tmp_path) -> None:
    run = tmp_path / "run"
    name = f"transformers/{folder}"
    more = ("--model", name, "--input-size", "16", "--epochs", "1", "--warmup-epochs", "0")
    assert train(images, run, *more, "--pretrained") == 0
    shutil.rmtree(folder)
    content = newest(run)
    own = inference.from_content(content)
    assert own.model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
