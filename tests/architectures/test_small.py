"""The small networks: any size, the CIFAR stem, dropout."""

import pytest
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from architectures.summary import summarise
from models import build_model


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet34_cifar", "simple_cnn", "modern_lenet"])
def test_small_network_learns_at_any_size(name):
    model = build_model(name, 5, input_size=32, drop=0.1)
    for size in (16, 29):
        model.zero_grad()
        outputs = model(images(size))
        assert outputs.shape == (2, 5)
        F.cross_entropy(outputs, torch.tensor([1, 4])).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.get_classifier().out_features == 5
    assert model.get_classifier().in_features == model.num_features
    model.reset_classifier(3)
    assert model.eval()(images()).shape == (2, 3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    head = model.pretrained_cfg["classifier"]
    assert layers[f"{head}.weight"] == max(layers.values()) > 1


def test_cifar_stem_keeps_the_resolution():
    model = build_model("resnet18_cifar", 10, input_size=32, drop_path=0.1, drop_block=0.1)
    assert model.forward_features(images(32)).shape == (2, 512, 4, 4)
    assert summarise(model, 32).macs / 1e9 == pytest.approx(0.556, abs=0.002)
    assert summarise(model, 32).parameters == 11_173_962  # the figure of the CIFAR literature


@pytest.mark.parametrize("name", ["simple_cnn", "modern_lenet"])
def test_dropout_of_small_networks(name):
    model = build_model(name, 5, input_size=32, drop=0.5)
    model.eval()
    assert torch.equal(model(images()), model(images()))
    model.head_drop.train()
    assert not torch.equal(model(images()), model(images()))
    with pytest.raises(ValueError, match="pooling"):
        model.reset_classifier(5, "max")
