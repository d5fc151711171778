"""tools.explain --layer --head: one head's attention against what the layers compute."""

import pytest
import timm
import torch
from PIL import Image
from uneven_attention import SIDE, cait, classifier, deit, layers_by_hand

import models
from errors import OptionError, UserError
from tools import explain
from tools.common.attention import all_layers, layer_map


def test_a_head_of_deit_is_that_of_the_formula():
    model, image = deit(), torch.randn(3, SIDE, SIDE)
    by_hand = layers_by_hand(model, image)
    for layer, maps in enumerate(by_hand):
        mean = torch.from_numpy(maps.mean(0)).float()[0, 1:].view(4, 4)
        torch.testing.assert_close(layer_map(model, image[None], layer), mean, atol=1e-5, rtol=0)
        for head in range(2):
            one = torch.from_numpy(maps[head]).float()[0, 1:].view(4, 4)
            given = layer_map(model, image[None], layer, head)
            torch.testing.assert_close(given, one, atol=1e-5, rtol=0)
            assert not torch.allclose(given, mean, atol=1e-3)


def test_talking_heads_are_what_the_values_are_weighed_with():
    model, image = cait(), torch.randn(1, 3, SIDE, SIDE)
    layer = model.blocks[0].attn
    torch.nn.init.normal_(layer.qkv.weight, std=0.5)
    torch.nn.init.normal_(layer.proj_w.weight)
    with torch.no_grad():
        x = model.blocks[0].norm1(model.patch_embed(image) + model.pos_embed)
        values = layer.qkv(x)[..., -16:].unflatten(-1, (2, 8))  # (1, N, heads, d)
        layer.proj.weight.copy_(torch.eye(16))
        layer.proj.bias.zero_()
        output = layer(x).unflatten(-1, (2, 8)).mean(1)[0]  # (heads, d)
    for head in range(2):
        read = layer_map(model, image, 0, head).flatten()  # by the mean of all patches
        torch.testing.assert_close(read @ values[0, :, head], output[head], atol=1e-5, rtol=1e-4)


def test_class_attention_comes_last():
    model, image = cait(), torch.randn(1, 3, SIDE, SIDE)
    assert len(all_layers(model)) == 3
    seen = []
    model.blocks_token_only[1].attn.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    given = [layer_map(model, image, 2, head) for head in (0, 1)]
    layer, tokens = model.blocks_token_only[1].attn, seen[0][0]
    for head in (0, 1):
        q, k = (y.view(-1, 2, 8)[:, head] for y in (layer.q(tokens[:1]), layer.k(tokens)))
        expected = (q @ k.T / 8**0.5).softmax(1)[0, 1:].view(4, 4)
        torch.testing.assert_close(given[head], expected)
    torch.testing.assert_close(layer_map(model, image, 2), (given[0] + given[1]) / 2)


def test_a_grid_need_not_be_square():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(16, 48),
        patch_size=8,
        num_classes=3,
        depth=1,
        embed_dim=16,
        num_heads=2,
        dynamic_img_size=True,
    ).eval()
    assert layer_map(model, torch.randn(1, 3, 16, 48), 0).shape == (2, 6)
    assert layer_map(model, torch.randn(1, 3, 48, 16), 0).shape == (6, 2)
    heat = explain.heatmap(classifier(model), torch.randn(3, 32, 24), layer=0, head=1)
    assert heat.shape == (32, 24) and heat.min() == 0 and heat.max() == 1


@pytest.mark.parametrize(
    "layer, head, message",
    [
        (3, None, "--layer: 3 is none of 0 to 2"),
        (-1, None, "--layer: -1 is none of 0 to 2"),
        (0, 2, "--head: 2 is none of 0 to 1"),
    ],
)
def test_the_ranges_are_named(layer, head, message):
    with pytest.raises(OptionError, match=message):
        layer_map(deit(), torch.randn(1, 3, SIDE, SIDE), layer, head)


def test_a_model_without_attention_says_so():
    model = models.build_model("modern_lenet", 3, input_size=32).eval()
    with pytest.raises(UserError, match="no attention that can be followed"):
        layer_map(model, torch.randn(1, 3, 32, 32), 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--head", "0"), "--head: is one of a layer"),
        (("--layer", "0", "--method", "last"), "--layer: contradicts --method last"),
        (("--layer", "0", "--class", "a"), "--layer: attention is the same for all classes"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, capsys, options, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = ["none.pth", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), *options]
    assert explain.main(line) == 2
    assert message in capsys.readouterr().err
