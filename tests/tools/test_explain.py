"""tools.explain: attention and Grad-CAM against computations of their own, and what lights up."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from uneven_attention import SIDE, cait, classifier, deit, layers_by_hand

import models
from errors import UserError
from inference import load_for_inference
from tools import explain
from tools.common.attention import recorded

# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, read", [(models.VisionTransformer, 1), (models.DistilledVisionTransformer, 2)]
)
def test_rollout_is_that_of_the_paper(kind, read):
    model, image = deit(kind), torch.randn(3, SIDE, SIDE)
    flow = np.eye(read + 16)
    for layer in layers_by_hand(model, image):
        mixed = 0.5 * layer.mean(0) + 0.5 * np.eye(read + 16)
        flow = mixed @ flow
    expected = flow[:read].mean(0)[read:].reshape(4, 4)
    given = explain.attention_map(model, image[None])
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5)


def test_last_is_the_last_layer():
    model, image = deit(), torch.randn(3, SIDE, SIDE)
    expected = layers_by_hand(model, image)[-1].mean(0)[0, 1:].reshape(4, 4)
    given = explain.attention_map(model, image[None], last=True)
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5)
    assert not np.allclose(explain.attention_map(model, image[None]).numpy(), expected, atol=1e-3)


def test_class_attention_of_cait():
    model, image = cait(), torch.randn(3, SIDE, SIDE)
    with torch.no_grad():
        x = model.blocks(model.patch_embed(image[None]) + model.pos_embed)
        token, rows = model.cls_token, []
        for block in model.blocks_token_only:
            tokens = block.norm1(torch.cat((token, x), 1))[0]
            q, k = block.attn.q(tokens[:1]).view(2, 8), block.attn.k(tokens).view(-1, 2, 8)
            scores = torch.einsum("hd,nhd->hn", q, k) / 8**0.5
            rows.append(scores.softmax(1).mean(0))
            token = block(x, token)
    last = rows[1][1:]
    # Half of what the second layer keeps of the token came through the first layer.
    both = 0.5 * last + (0.5 + 0.5 * rows[1][0]) * 0.5 * rows[0][1:]
    for expected, how in ((last, "last"), (both, "rollout")):
        given = explain.attention_map(model, image[None], last=how == "last").flatten()
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_timms_transformers_are_followed():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        num_classes=3,
        depth=2,
        embed_dim=16,
        num_heads=2,
        qk_norm=True,
    ).eval()
    layer = model.blocks[-1].attn
    seen = []
    hook = layer.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer.fused_attn = False
    image = torch.randn(3, 32, 32)
    given = explain.attention_map(model, image[None], last=True)
    hook.remove()
    torch.testing.assert_close(given.flatten(), seen[0].mean(1)[0, 0, 1:])


# --- Grad-CAM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "width"), [(0, 64), (2, 96), (None, 64)])
def test_grad_cam_of_pooling_and_a_linear_head_is_class_activation_mapping(index, width):
    # With global average pooling αₖ is the head's weight over the number of places.
    model = models.build_model("resnet10t", 3, input_size=64).eval()
    nn.init.uniform_(model.fc.weight, -0.2, 1.0)
    image = torch.randn(1, 3, 64, width)
    with torch.no_grad():
        features = model.forward_features(image)[0]
        asked = int(model(image).argmax()) if index is None else index
        weights = model.fc.weight[asked] / features[0].numel()
        expected = torch.einsum("k,khw->hw", weights, features).relu()
    assert expected.shape == (2, width // 32) and expected.max() > 0
    torch.testing.assert_close(explain.grad_cam(model, image, index), expected)


def test_grad_cam_of_a_transformer_is_that_of_its_last_patches():
    model, image = deit(), torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        x = torch.cat((model.prefix_tokens(), model.patch_embed(image)), 1) + model.pos_embed
        x = model.blocks[:-1](x)
    block = model.blocks[-1]
    tokens = block.norm1(x).detach().double().requires_grad_(True)

    def logit(tokens: torch.Tensor) -> torch.Tensor:
        y = x + block.attn(tokens.float())
        return model.head(model.norm(y + block.mlp(block.norm2(y)))[:, 0])[0, 1]

    logit(tokens).backward()
    expected = (tokens[0, 1:] * tokens.grad[0, 1:]).sum(1).relu().detach().view(4, 4)
    given = explain.grad_cam(model, image, 1)
    torch.testing.assert_close(given.double(), expected, atol=1e-6, rtol=1e-4)


def test_the_mean_of_patches_that_have_seen_each_other_is_refused():
    """A trained MViT has 7 % of the heat in the one square of 6 % that decides: chance."""
    model = timm.create_model("mvitv2_tiny", num_classes=3, img_size=64).eval()
    with pytest.raises(UserError, match="MultiScaleVit is the mean of patches"):
        explain.grad_cam(model, torch.randn(1, 3, 64, 64), 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convit_tiny", {"num_heads": 4, "local_up_to_layer": 1}),
        (
            "tnt_s_legacy_patch16_224",
            {"img_size": 64, "inner_dim": 8, "num_heads_inner": 2, "num_heads_outer": 4},
        ),
    ],
)
def test_grad_cam_under_a_class_token_is_that_of_the_last_patches_it_reads(name, options):
    model = timm.create_model(name, num_classes=3, embed_dim=16, depth=3, **options).eval()
    size = options.get("img_size", 224)
    block, taken, image = model.blocks[-1], [], torch.randn(1, 3, size, size)
    norm = block.norm1 if "convit" in name else block.norm_out
    hook = norm.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    logits = model(image.requires_grad_(True))
    hook.remove()
    [tokens] = taken
    [gradient] = torch.autograd.grad(logits[0, 1], tokens)
    weights = gradient[0, 1:].mean(0)
    side = round((tokens.shape[1] - 1) ** 0.5)
    expected = (tokens[0, 1:] @ weights).relu().view(side, side)
    torch.testing.assert_close(explain.grad_cam(model, image, 1), expected.detach())


class Attending(nn.Module):
    """Attention between the places of a map, with its weights (1, 1, N, N) out in the open."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.softmax = nn.Conv2d(3, 8, 4, stride=4), nn.Softmax(-1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.before(x).flatten(2).transpose(1, 2)[:, None]
        return self.head((self.softmax(places @ places.transpose(2, 3)) @ places).mean((1, 2)))


def test_weights_of_attention_are_no_feature_map():
    model, image = Attending().eval(), torch.randn(1, 3, SIDE, SIDE)
    given = explain.grad_cam(model, image, 0)
    with torch.enable_grad():
        model.before.register_forward_hook(lambda layer, x, y: y.retain_grad() or kept.append(y))
        kept: list[torch.Tensor] = []
        model(image)[0, 0].backward()
    weights = kept[0].grad[0].mean((1, 2))
    expected = torch.einsum("c,chw->hw", weights, kept[0][0]).relu()
    torch.testing.assert_close(given, expected.detach())


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "convnext_atto", "modern_lenet", "regnetx_002"]
)
def test_many_networks_have_a_feature_map(name):
    model = models.build_model(name, 3, input_size=64).eval()
    heat = explain.heatmap(classifier(model), torch.randn(3, 64, 64), 1)
    assert heat.shape == (64, 64) and heat.min() >= 0 and heat.max() <= 1


class Permute(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


def test_channels_may_come_last():
    convolution, head = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 3)
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    first = nn.Sequential(convolution, nn.ReLU(), pooling, head)
    unpermute = nn.Sequential(nn.Flatten(1, 2), nn.Unflatten(1, (1, -1)))
    last = nn.Sequential(convolution, Permute(), nn.ReLU(), unpermute, Mean(), head)
    for width in (SIDE, 2 * SIDE):
        image = torch.randn(1, 3, SIDE, width)
        torch.testing.assert_close(first(image), last(image))
        for index in range(3):
            given = explain.grad_cam(last, image, index)
            torch.testing.assert_close(given, explain.grad_cam(first, image, index))


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2))


def test_frozen_models_can_be_explained():
    model = models.build_model("simple_cnn", 3, input_size=32).requires_grad_(False)
    heat = explain.heatmap(classifier(model), torch.randn(3, 32, 32))
    assert heat.max() == 1 and not heat.requires_grad


# --- what lights up -------------------------------------------------------------------------------


class CornerNetwork(nn.Module):
    """Its answer depends on the upper left quarter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.quarter = Quarter()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.quarter(self.features(x)).mean((2, 3)))


class Quarter(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(x)
        mask[..., : x.shape[2] // 2, : x.shape[3] // 2] = 1
        return x * mask


def corner_transformer() -> nn.Module:
    """A DeiT that reads only the first patch: its position answers every question."""
    model = deit(depth=1)
    block = model.blocks[0]
    with torch.no_grad():
        # LayerNorm leaves a vector of which one entry towers as it is.
        model.pos_embed.zero_()
        model.pos_embed[0, 1, 0] = 50.0
        qkv = block.attn.qkv
        qkv.weight[:32] = 0.0
        qkv.bias[:32] = 0.0
        for head in (0, 8):
            qkv.bias[head] = 20.0  # of the questions
            qkv.weight[16 + head, 0] = 20.0  # of the keys
        # What speaks against one class speaks for the other.
        model.head.weight[1] = -model.head.weight[0]
    return model


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("build", [CornerNetwork, corner_transformer])
def test_the_corner_that_decides_lights_up(build, by_class):
    model = classifier(build())
    side = 4 if build is corner_transformer else 8
    image = torch.randn(3, SIDE, SIDE)
    elsewhere = image.clone()
    elsewhere[:, side + 1 :, side + 1 :] += 3.0
    with torch.no_grad():
        torch.testing.assert_close(model.model(image[None]), model.model(elsewhere[None]))
    heats = [explain.heatmap(model, image, index) for index in ((0, 1, 2) if by_class else (None,))]
    # Nothing lights up for a class that the corner speaks against.
    heats = [heat for heat in heats if heat.max() > 0]
    assert heats
    for heat in heats:
        assert heat.shape == (SIDE, SIDE) and heat.max() == 1 and heat.min() == 0
        assert heat[:side, :side].mean() > 5 * heat[side + 2 :, side + 2 :].mean()
        row, column = divmod(int(heat.argmax()), SIDE)
        assert row < side and column < side


def test_auto_is_attention_unless_a_class_is_asked_for():
    model, image = classifier(deit()), torch.randn(3, SIDE, SIDE)
    rollout = explain.heatmap(model, image, method="rollout")
    torch.testing.assert_close(explain.heatmap(model, image), rollout)
    grad_cam = explain.heatmap(model, image, 1, method="grad-cam")
    torch.testing.assert_close(explain.heatmap(model, image, 1), grad_cam)
    assert not torch.allclose(rollout, grad_cam, atol=0.05)


@pytest.mark.parametrize("index", [None, 1])
def test_other_threads_do_not_disturb(index):
    model = classifier(deit())
    images = [torch.randn(3, SIDE, SIDE) for _ in range(12)]
    alone = [explain.heatmap(model, image, index) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: explain.heatmap(model, image, index), images))
    for left, right in zip(alone, together, strict=True):
        torch.testing.assert_close(left, right)


def test_pooled_patches_are_asked_where_they_are_what_is_read():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        num_classes=3,
        depth=1,
        embed_dim=16,
        num_heads=2,
        class_token=False,
        global_pool="avg",
    ).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), recorded([model.blocks[0].attn]) as weights:
        model(image)
    given = explain.attention_map(model, image, last=True)
    torch.testing.assert_close(given.flatten(), weights[0].mean(1)[0].mean(0))


def test_what_cannot_be_explained_says_so():
    image = torch.randn(3, 32, 32)
    network = classifier(models.build_model("modern_lenet", 3, input_size=32))
    with pytest.raises(UserError, match="--method grad-cam"):
        explain.heatmap(network, image, method="rollout")
    with pytest.raises(UserError, match="ONNX"):
        explain.heatmap(classifier(nn.Identity()), image)
    several = timm.create_model("crossvit_tiny_240", num_classes=3, depth=((1, 1, 0),) * 3)
    with pytest.raises(UserError, match="CrossVit has more than one feature map"):
        explain.heatmap(classifier(several), torch.randn(3, 240, 240))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    with pytest.raises(UserError, match="no feature map"):
        explain.heatmap(classifier(flat), image)


# --- command line ---------------------------------------------------------------------------------


def test_overlays_and_page_are_written(checkpoint, images, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.touch()
    argv = [checkpoint, images / "val/blue", broken, "--output", tmp_path / "out"]
    assert explain.main([*map(str, argv), "--device", "cpu"]) == 4
    assert "broken.png: an empty file" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    with Image.open(tmp_path / "out" / "0000-0.png") as image:
        assert image.size == (224, 224)
    text = (tmp_path / "out" / "explain.html").read_text()
    assert text.count("data:image/png") == 12
    _, _, names = load_for_inference(checkpoint)
    assert any(f"0.png: {name}" in text for name in names)
    assert explain.main([*map(str, argv), "--class", "green", "--device", "cpu"]) == 2
    assert "no class 'green'" in capsys.readouterr().err


def test_overlay_leaves_the_image_where_there_is_no_heat():
    image = Image.new("RGB", (10, 10), (10, 200, 30))
    heat = torch.zeros(10, 10)
    heat[0, 0] = 1
    drawn = explain.overlay(image, heat)
    assert drawn.getpixel((9, 9)) == (10, 200, 30)
    red, green, _ = drawn.getpixel((0, 0))
    assert red > 80 and green < 100


def test_seen_undoes_the_normalisation():
    tensor = (torch.full((3, 2, 2), 0.6) - 0.5) / 0.25
    assert explain.seen(tensor, (0.5,) * 3, (0.25,) * 3).getpixel((0, 0)) == (153, 153, 153)
    # Of 16 bits, here the lowest hundredth of the range, the levels that there are fill it.
    dark = torch.linspace(0, 0.01, 100).view(1, 10, 10)
    shown = explain.seen(dark, (0.0,), (1.0,), bit_depth=16)
    assert shown.getextrema() == ((0, 255),) * 3
