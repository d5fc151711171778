"""timm's interface on one small model of each family: what timm's tests/test_models.py asks of its
own, from ``timm.create_model`` to TorchScript and FX.

Also of architectures/interface.py.
"""

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from tiny_models import randomise
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import models  # noqa: F401 (registers them)

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
TOKENS = {  # tokens in front of the patches inside the blocks
    "deit_tiny_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "deit_tiny_patch16_LS": 1,
    "deit_small_patch16_18x2": 1,
    "deit_small_patch16_18x2_LS": 1,
    "cait_XXS24_224": 0,
}
BLOCKS = 4


@pytest.fixture(params=TOKENS)
def name(request):
    return request.param


def build(name: str, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(TINY | arguments)).eval()


def random(name: str, **arguments) -> torch.nn.Module:
    model = build(name, num_classes=5, **arguments)
    randomise(model)
    return model


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def test_attributes(name):
    model = build(name, num_classes=7, in_chans=1)
    assert (model.num_classes, model.in_chans) == (7, 1)
    assert model.num_features == model.head_hidden_size == 24
    cfg = model.default_cfg
    assert cfg["first_conv"] == "patch_embed.proj" and cfg["fixed_input_size"]
    heads = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
    layers = {key.partition(".")[0] for key in model.state_dict()}
    assert {layer for layer in layers if layer.startswith("head")} == set(heads)
    found = model.get_classifier()
    found = found if isinstance(found, tuple) else (found,)
    assert [id(head) for head in found] == [id(model.get_submodule(head)) for head in heads]
    assert model(images(1)).shape == (2, 7)


def test_heads(name):
    model = random(name)
    features = model.forward_features(images())
    assert features.shape == (2, 16 + model.num_prefix_tokens, 24)
    pooled = model.forward_head(features, pre_logits=True)
    tokens = 2 if "distilled" in name else 1
    torch.testing.assert_close(pooled, features[:, :tokens].mean(1))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(images()), pooled)
    assert build(name, num_classes=0)(images()).shape == (2, 24)
    if "distilled" in name:
        with pytest.raises(ValueError, match="no global_pool 'avg': use one of 'token'"):
            model.reset_classifier(3, "avg")
        return
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), features)
    model.reset_classifier(0, "avg")
    patches = features[:, model.num_prefix_tokens :]
    torch.testing.assert_close(model(images()), patches.mean(1))
    assert build(name, num_classes=0, global_pool="avg")(images()).shape == (2, 24)
    assert build(name, num_classes=0, global_pool="")(images()).shape == features.shape
    with pytest.raises(ValueError, match="no global_pool 'max': use one of 'token', 'avg', ''"):
        build(name, global_pool="max")


def test_intermediates(name):
    model = random(name)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    expected = model.forward_features(images())
    prefix, seen = TOKENS[name], [y.clone() for y in outputs]
    final, found = model.forward_intermediates(images(), output_fmt="NLC")
    assert torch.equal(final, expected)
    assert all(torch.equal(a, b[:, prefix:]) for a, b in zip(found, seen, strict=True))
    _, (first, last) = model.forward_intermediates(images(), indices=[0, -1], norm=True)
    expected = model.norm(seen[-1])[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert torch.equal(last, expected) and first.shape == (2, 24, 4, 4)
    outputs.clear()
    only = model.forward_intermediates(
        images(), indices=[1], stop_early=True, intermediates_only=True
    )
    assert len(only) == 1 and len(outputs) == 2
    parts = model.forward_intermediates(
        images(), 2, output_fmt="NLC", output_dict=True, return_prefix_tokens=True
    )
    assert torch.equal(parts["image_features"], final)
    assert torch.equal(parts["image_intermediates"][0], found[2])
    if prefix:
        assert torch.equal(parts["image_intermediates_prefix"][1], seen[3][:, :prefix])
    with pytest.raises(ValueError, match="NCHW or NLC, not NHWC"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_features_only(name):
    net = build(name, features_only=True, out_indices=(0, -2))
    assert isinstance(net, FeatureGetterNet)
    assert net.feature_info.channels() == [24, 24]
    assert net.feature_info.reduction() == [8, 8]
    assert len(net.model.blocks) == BLOCKS - 1  # the last one isn't needed
    assert not any("head" in key or key.startswith("model.norm.") for key in net.state_dict())
    whole = build(name)
    expected = whole.forward_intermediates(images(), [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(net(images()), expected, strict=True))
    assert len(build(name, features_only=True)(images())) == 3
    # What is left still runs, and knows which tokens it has.
    left = net.model.forward_features(images())
    assert left.shape == (2, 16 + net.model.num_prefix_tokens, 24)


def test_gradient_checkpointing_of_intermediates(name):
    model = random(name)
    final, found = model.forward_intermediates(images())
    model.set_grad_checkpointing()
    again, others = model.forward_intermediates(images())
    torch.testing.assert_close(again, final)
    torch.testing.assert_close(others, found)


def test_every_parameter_gets_a_gradient(name):
    model = build(name, num_classes=5).train()
    outputs = model(images())
    torch.cat(outputs if isinstance(outputs, tuple) else (outputs,)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
def test_torchscript(name):
    model = random(name, scriptable=True)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images()), model(images()), atol=1e-4, rtol=1e-4)
    with pytest.raises(torch.jit.Error, match="built for 32"):
        scripted(torch.zeros(1, 3, 16, 32))


@pytest.mark.filterwarnings("ignore:.*torch.jit:", "ignore:.*nodes obtained by tracing")
def test_fx(name):
    model = random(name)
    training, evaluation = get_graph_node_names(model)
    graph = create_feature_extractor(
        model, train_return_nodes=training[-1:], eval_return_nodes=evaluation[-1:]
    )
    (logits,) = graph(images()).values()
    assert torch.equal(logits, model(images()))
    (logits,) = torch.jit.script(graph)(images()).values()
    torch.testing.assert_close(logits, model(images()), atol=1e-4, rtol=1e-4)
    graph.train()(images())[training[-1]].sum().backward()
    assert graph.get_parameter("blocks.0.attn.qkv.weight").grad.abs().sum() > 0
