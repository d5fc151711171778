"""The small networks: any size, the CIFAR stem, dropout, what timm asks of a CNN."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from architectures.summary import summarise
from models import build_model

NAMES = ["resnet18_cifar", "resnet34_cifar", "simple_cnn", "modern_lenet"]
PLAIN = ["simple_cnn", "modern_lenet"]


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_small_network_learns_at_any_size(name):
    model = build_model(name, 5, input_size=32, drop=0.1)
    for size in (16, 29):
        model.zero_grad()
        outputs = model(images(size))
        assert outputs.shape == (2, 5)
        F.cross_entropy(outputs, torch.tensor([1, 4])).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.get_classifier().out_features == 5
    assert model.get_classifier().in_features == model.head_hidden_size
    model.reset_classifier(3)
    assert model.eval()(images()).shape == (2, 3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    head = model.pretrained_cfg["classifier"]
    assert layers[f"{head}.weight"] == max(layers.values()) > 1
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_cifar_stem_keeps_the_resolution():
    model = build_model("resnet18_cifar", 10, input_size=32, drop_path=0.1, drop_block=0.1)
    assert model.forward_features(images(32)).shape == (2, 512, 4, 4)
    assert summarise(model, 32).macs / 1e9 == pytest.approx(0.556, abs=0.002)
    assert summarise(model, 32).parameters == 11_173_962  # the figure of the CIFAR literature


@pytest.mark.parametrize("name", PLAIN)
def test_dropout_of_small_networks(name):
    model = build_model(name, 5, input_size=32, drop=0.5)
    model.eval()
    assert torch.equal(model(images()), model(images()))
    model.head_drop.train()
    assert not torch.equal(model(images()), model(images()))


@pytest.mark.parametrize("name", PLAIN)
def test_the_layers_are_one_sequence(name):
    model = build_model(name, 5, input_size=32).eval()
    expected = model.head(model.features(images()))
    assert torch.equal(model(images()), expected)
    assert torch.equal(torch.jit.script(model)(images()), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_without_pooling_the_map_is_left(name):
    model = build_model(name, 5, input_size=32).eval()
    features = model.forward_features(images())
    assert features.shape[1] == model.num_features
    assert features.shape[2:] == model.pretrained_cfg["pool_size"]
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert torch.equal(model(images()), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), features)
    for pool in ("", "max"):
        with pytest.raises(ValueError, match="pooling"):
            model.reset_classifier(5, pool)
    with pytest.raises(ValueError, match="pooling"):
        timm.create_model(name, global_pool="")


@pytest.mark.parametrize("name", PLAIN)
def test_features_are_what_is_pooled_and_the_map(name):
    model = timm.create_model(name).eval()
    expected = []
    for pool in (m for m in model.modules() if isinstance(m, nn.MaxPool2d | nn.AdaptiveAvgPool2d)):
        pool.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    model(images())
    getter = timm.create_model(name, features_only=True).eval()
    getter.model.load_state_dict(model.state_dict(), strict=False)
    reductions = [32 // x.shape[-1] for x in expected]
    assert getter.feature_info.reduction() == reductions == [2**i for i in range(len(expected))]
    assert getter.feature_info.channels() == [x.shape[1] for x in expected]
    assert all(torch.equal(x, y) for x, y in zip(getter(images()), expected, strict=True))
    first = timm.create_model(name, features_only=True, out_indices=(0,)).eval()
    first.model.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(first(images())[0], expected[0])
    assert len(first.state_dict()) < len(getter.state_dict())
    last, maps = model.forward_intermediates(images(), indices=[1, 0], stop_early=True)
    assert torch.equal(last, expected[1])
    assert [len(x[0]) for x in maps] == [len(x[0]) for x in (expected[1], expected[0])]
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_reductions_of_the_cifar_resnet():
    model = timm.create_model("resnet18_cifar", features_only=True)
    sizes = [x.shape[-1] for x in model(images())]
    assert [32 // size for size in sizes] == model.feature_info.reduction() == [1, 1, 2, 4, 8]
