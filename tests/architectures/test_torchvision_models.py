"""torchvision's models behind the interface of the others.

Also of architectures/library_model.py.
"""

import pytest
import timm
import torch
import torchvision
from timm.models import adapt_input_conv, group_parameters

import models
from architectures.factory import published_cfg
from architectures.weights import load_pretrained_weights
from errors import OptionError


def test_logits_and_names_are_torchvisions() -> None:
    twin = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=4).eval()
    own = models.build_model("torchvision/shufflenet_v2_x0_5", 4, input_size=32).eval()
    own.load_state_dict(twin.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(own(images), twin(images))
    assert own.get_classifier() is own.fc
    own.reset_classifier(7)
    assert own(images).shape == (2, 7)


def test_preprocessing_and_labels_are_those_of_the_weights() -> None:
    weights = torchvision.models.ConvNeXt_Tiny_Weights.DEFAULT
    images, cfg = weights.transforms(), published_cfg("torchvision/convnext_tiny")
    assert int(cfg["input_size"][1] / cfg["crop_pct"]) == images.resize_size[0]
    assert cfg["input_size"] == (3, *images.crop_size * 2)
    assert (list(cfg["mean"]), list(cfg["std"])) == (images.mean, images.std)
    assert cfg["label_names"] == weights.meta["categories"]


def test_published_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = torchvision.models.resnet18(weights=None)
    kind = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **_: twin.state_dict())
    own = models.build_model("torchvision/resnet18", 3, pretrained=True)
    assert torch.equal(own.layer3[0].conv1.weight, twin.layer3[0].conv1.weight)
    assert own.fc.out_features == 3


def test_published_file_fills_timms_model_of_the_same_names() -> None:
    twin = torchvision.models.resnet18(weights=None).eval()
    own = timm.create_model("resnet18").eval()
    assert not load_pretrained_weights(own, twin.state_dict()).missing
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(own(images), twin(images))


def test_layers_go_from_stem_to_head() -> None:
    model = models.build_model("torchvision/resnet18", 3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [f"layer{i}.{j}.conv1.weight" for i in range(1, 5) for j in range(2)]
    order = ["conv1.weight", *blocks, "fc.weight"]
    assert [layers[name] for name in order] == list(range(10))


@pytest.mark.parametrize(
    ("name", "first"), [("resnet18", "conv1"), ("squeezenet1_1", "features.0")]
)
def test_other_channels(name: str, first: str) -> None:
    twin = torchvision.models.get_model(name, num_classes=3).eval()
    own = models.build_model(f"torchvision/{name}", 3, in_chans=5).eval()
    new, old = own.get_submodule(first), twin.get_submodule(first)
    torch.testing.assert_close(new.weight.var() * 5, old.weight.var() * 3, rtol=0.1, atol=0)
    report = load_pretrained_weights(own, twin.state_dict())
    assert report.fitted == {f"{first}.weight": "3 to 5 channels"}
    assert torch.equal(new.weight, adapt_input_conv(5, old.weight))
    with torch.no_grad():
        old.weight, old.in_channels = torch.nn.Parameter(new.weight.clone()), 5
        images = torch.randn(1, 5, 64, 64)
        assert torch.equal(own(images), twin(images))


def test_a_transform_of_three_colours_takes_no_other_channels() -> None:
    with pytest.raises(OptionError, match="takes no in_chans") as error:
        models.build_model("torchvision/googlenet", 3, in_chans=1)
    assert error.value.option == "in_chans"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet81", "did you mean resnet18"),
        ("torchvision/resnet18.V3", "there are IMAGENET1K_V1|did you mean IMAGENET1K_V1"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        models.resolve_name(name)
