"""Models by name: DeiT against timm's, small networks, build_model, weights of other models."""

import logging
import warnings

import huggingface_hub.constants
import pytest
import timm
import timm.models._builder
import torch
import torch.nn.functional as F
from timm.models import deit as timm_deit
from timm.models import group_parameters
from torch import nn

import models
from errors import CheckpointError, OptionError
from models import (
    Attention,
    DistilledVisionTransformer,
    VisionTransformer,
    build_model,
    interpolate_grid,
    load_pretrained_weights,
    resolve_name,
    summarise,
)

PUBLISHED = [
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
]
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
CLASSES = [VisionTransformer, DistilledVisionTransformer]


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def pictures(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


# --- DeiT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_is_that_of_the_published_checkpoint(name):
    with torch.device("meta"):
        ours = timm.create_model(name)
        theirs = getattr(timm_deit, name)()
    assert type(ours).__module__ == "models"
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    assert ours.pretrained_cfg["hf_hub_id"] == f"timm/{name}.fb_in1k"


@pytest.mark.parametrize("img_size", [32, (32, 64)])
@pytest.mark.parametrize("distilled", [False, True])
def test_logits_equal_timms(distilled, img_size):
    arguments = SMALL | {"img_size": img_size}
    ours = CLASSES[distilled](**arguments)
    their_class = [timm_deit.VisionTransformer, timm_deit.VisionTransformerDistilled][distilled]
    theirs = their_class(**arguments)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x = pictures(*ours.patch_embed.img_size)
    expected = theirs.eval()(x)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(ours.eval()(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=1e-4
    )
    if distilled:
        theirs.set_distilled_training()
        in_training = ours.train()(x)
        for head, expected_head in zip(in_training, theirs.train()(x), strict=True):
            torch.testing.assert_close(head, expected_head, atol=1e-4, rtol=1e-4)
        assert (in_training[0] - in_training[1]).abs().max() > 0.1
        torch.testing.assert_close((in_training[0] + in_training[1]) / 2, expected)


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("deit_tiny", 5.72, 1.26),
        ("deit_small", 22.05, 4.61),
        ("deit_base", 86.57, 17.58),
        ("deit_tiny_distilled", 5.91, None),
        ("deit_small_distilled", 22.44, None),
        ("deit_base_distilled", 87.34, None),
        ("deit_base_384", 86.86, None),
        ("deit_base_distilled_384", 87.63, None),
    ],
)
def test_published_sizes(name, millions, gmacs):
    with torch.device("meta"):
        model = timm.create_model(resolve_name(name))
    summary = summarise(model, model.patch_embed.img_size[0])
    assert summary.parameters / 1e6 == pytest.approx(millions, abs=0.006)
    if gmacs:
        assert summary.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_attention_follows_the_formula():
    layer = Attention(12, num_heads=3)
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(12, dim=-1)
    heads = [
        (q[..., d] @ k[..., d].transpose(1, 2) / 2).softmax(-1) @ v[..., d]
        for d in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def test_stochastic_depth_grows_linearly():
    model = VisionTransformer(**SMALL, drop_path_rate=0.2, drop_rate=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.1] * (1 + 3 * 3)


def test_dropout_of_attention_only_in_training():
    layer = Attention(12, num_heads=3, attn_drop=0.5)
    x = torch.randn(2, 50, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_initialisation():
    model = DistilledVisionTransformer(num_classes=100, depth=1)
    for name in ("cls_token", "dist_token", "pos_embed", "head.weight", "head_dist.weight"):
        assert model.state_dict()[name].std().item() == pytest.approx(0.02, rel=0.1), name
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0


@pytest.mark.parametrize("distilled", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(distilled):
    model = CLASSES[distilled](**SMALL)
    randomise(model)
    gradients, runs = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        outputs = model(pictures())
        torch.stack(outputs if distilled else (outputs,)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert runs == [False, True, True]  # the second time in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_layers_for_layer_decay():
    model = DistilledVisionTransformer(**SMALL)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    expected = {
        "pos_embed": 0,
        "dist_token": 0,
        "patch_embed.proj.bias": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.2.mlp.fc2.weight": 3,
        "norm.weight": 3,
        "head.weight": 4,
        "head_dist.bias": 4,
    }
    assert {name: layers[name] for name in expected} == expected
    assert model.no_weight_decay() >= {"pos_embed", "cls_token", "dist_token"}


def test_heads_can_be_replaced():
    model = DistilledVisionTransformer(**SMALL).double()
    model.reset_classifier(5)
    assert model.get_classifier() == (model.head, model.head_dist)
    assert [y.shape for y in model(pictures().double())] == [(2, 5), (2, 5)]
    plain = VisionTransformer(**SMALL)
    plain.reset_classifier(0)
    assert plain(pictures()).shape == (2, 48)
    tokens = torch.randn(2, 6, 48)
    torch.testing.assert_close(plain.forward_head(tokens, pre_logits=True), tokens[:, 0])
    features = DistilledVisionTransformer(**SMALL).forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(features, tokens[:, :2].mean(1))
    with pytest.raises(ValueError, match="avg"):
        plain.reset_classifier(5, "avg")


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="32×32 pixels, the pictures have 48×32"):
        VisionTransformer(**SMALL)(pictures(48, 32))
    with pytest.raises(ValueError, match="40×32 pixels can't be cut into patches of 16"):
        VisionTransformer(**(SMALL | {"img_size": (40, 32)}))


def test_only_our_own_overwriting_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry = models._deit("deit_tiny_patch16_224", 224, 16, models._TINY)
        with pytest.raises(UserWarning, match="Overwriting deit_tiny_patch16_224"):
            timm.models.register_model(entry)
    assert timm.models.model_entrypoint("deit_tiny_patch16_224") is entry


# --- every registered model ---------------------------------------------------------------------

TRANSFORMERS = [name for name in timm.list_models(module="models") if name.startswith("deit_")]
CAIT = timm.list_models(module="cait_models")


def test_the_family_is_registered():
    assert set(PUBLISHED) < set(TRANSFORMERS)
    assert len(TRANSFORMERS) == 13 and len(CAIT) == 10
    small = {"resnet18_cifar", "resnet34_cifar", "simple_cnn", "modern_lenet"}
    registered = timm.list_models(module="models", exclude_filters="tiny_test_*")
    assert set(registered) == small | set(TRANSFORMERS)


@pytest.mark.parametrize("name", TRANSFORMERS + CAIT)
def test_transformer_learns_at_two_sizes(name):
    for size in (32, 48):
        model = timm.create_model(name, num_classes=5, img_size=size, depth=1, drop_path_rate=0.1)
        outputs = model(pictures(size))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(y.shape == (2, 5) for y in outputs)
        sum(F.cross_entropy(y, torch.tensor([1, 4])) for y in outputs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet34_cifar", "simple_cnn", "modern_lenet"])
def test_small_network_learns_at_any_size(name):
    model = build_model(name, 5, input_size=32, drop=0.1)
    for size in (16, 29):
        model.zero_grad()
        outputs = model(pictures(size))
        assert outputs.shape == (2, 5)
        F.cross_entropy(outputs, torch.tensor([1, 4])).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.get_classifier().out_features == 5
    assert model.get_classifier().in_features == model.num_features
    model.reset_classifier(3)
    assert model.eval()(pictures()).shape == (2, 3)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    head = model.pretrained_cfg["classifier"]
    assert layers[f"{head}.weight"] == max(layers.values()) > 1


def test_cifar_stem_keeps_the_resolution():
    model = build_model("resnet18_cifar", 10, input_size=32, drop_path=0.1, drop_block=0.1)
    assert model.forward_features(pictures(32)).shape == (2, 512, 4, 4)
    assert summarise(model, 32).macs / 1e9 == pytest.approx(0.556, abs=0.002)
    assert summarise(model, 32).parameters == 11_173_962  # the figure of the CIFAR literature


@pytest.mark.parametrize("name", ["simple_cnn", "modern_lenet"])
def test_dropout_of_small_networks(name):
    model = build_model(name, 5, input_size=32, drop=0.5)
    model.eval()
    assert torch.equal(model(pictures()), model(pictures()))
    model.head_drop.train()
    assert not torch.equal(model(pictures()), model(pictures()))
    with pytest.raises(ValueError, match="pooling"):
        model.reset_classifier(5, "max")


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("DeiT_small", "deit_small_patch16_224"),
        ("deit_base", "deit_base_patch16_224"),
        ("deit_tiny_distilled", "deit_tiny_distilled_patch16_224"),
        ("deit_small_distilled", "deit_small_distilled_patch16_224"),
        ("deit_base_distilled", "deit_base_distilled_patch16_224"),
        ("deit_base_384", "deit_base_patch16_384"),
        ("deit_base_distilled_384", "deit_base_distilled_patch16_384"),
        ("deit_tiny.fb_in1k", "deit_tiny_patch16_224.fb_in1k"),
        ("cait_xxs24_224", "cait_XXS24_224"),
        ("cait_xxs24", "cait_XXS24"),
        ("cait_xxs24_384", "cait_XXS24"),
        ("cait_m48_448", "cait_M48"),
        ("CAIT_M36", "cait_M36"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
    ],
)
def test_names(name, resolved):
    assert resolve_name(name) == resolved


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(
        OptionError, match="--model: unknown model 'deit_smal'.*deit_small"
    ) as error:
        resolve_name("deit_smal")
    assert error.value.option == "model"
    with pytest.raises(OptionError, match="list_models"):
        resolve_name("%%%")


# --- build_model --------------------------------------------------------------------------------


def test_arguments_reach_the_model():
    model = build_model("deit_nano_patch4_32", 5, input_size=16, drop=0.1, drop_path=0.3)
    assert model.head.out_features == 5
    assert model.patch_embed.img_size == (16, 16)
    assert model.pos_drop.p == 0.1
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert model.pretrained_cfg["crop_pct"] == 1.0


def test_cnn_takes_what_it_knows():
    model = build_model(
        "resnet10t",
        5,
        input_size=96,
        drop=0.2,
        drop_path=0.1,
        drop_block=0.1,
        grad_checkpointing=True,
        required=("drop", "drop_path", "drop_block", "input_size"),
    )
    assert model.drop_rate == 0.2
    assert model.grad_checkpointing
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"DropPath", "DropBlock2d"} <= kinds


def test_zero_overrides_a_models_own_stochastic_depth():
    with torch.device("meta"):
        model = build_model("swin_tiny_patch4_window7_224", 5, drop_path=0.0)
    assert not any(type(module).__name__ == "DropPath" for module in model.modules())


@pytest.mark.parametrize(
    ("name", "option"),
    [("deit_nano_patch4_32", "drop_block"), ("simple_cnn", "drop_path"), ("vgg11", "drop_path")],
)
def test_option_the_model_does_not_take(name, option, caplog):
    caplog.set_level(logging.INFO, "models")
    with torch.device("meta"):
        build_model(name, 5, input_size=32, **{option: 0.1})
        assert f"--{option.replace('_', '-')} is left out" in caplog.text
        caplog.clear()
        build_model(name, 5, input_size=32, **{option: 0.0}, required=(option, "input_size"))
        assert not caplog.text
        with pytest.raises(OptionError, match=f"{name} takes no {option}_rate") as error:
            build_model(name, 5, input_size=32, **{option: 0.1}, required=(option,))
    assert error.value.option == option


def test_several_unknown_arguments_at_once(caplog):
    """Some of timm's models list all the arguments they don't take in one message."""
    caplog.set_level(logging.INFO, "models")
    with torch.device("meta"):
        build_model("hrnet_w18_small", 5, drop_path=0.1)
    assert "--drop-path is left out" in caplog.text


@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "cait_XXS24_224", "xcit_nano_12_p16_224"])
def test_impossible_size(name):
    with torch.device("meta"), pytest.raises(OptionError, match=f"--input-size: {name} .* 31 pix"):
        build_model(name, 5, input_size=31)


def test_size_of_other_making_is_said_unless_asked_for(caplog):
    build_model("deit_nano_patch4_32", 5, input_size=24)
    assert "meant for 32 pixels and built for 24" in caplog.text
    caplog.clear()
    build_model("deit_nano_patch4_32", 5, input_size=24, required=("input_size",))
    build_model("deit_nano_patch4_32", 5, input_size=32)
    build_model("simple_cnn", 5, input_size=24)
    assert not caplog.text


def test_errors_that_are_not_about_the_size_stay(monkeypatch):
    def broken(**kwargs):
        raise ValueError("a bug")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "simple_cnn", broken)
    with pytest.raises(ValueError, match="a bug"):
        build_model("simple_cnn", 5)


def test_gradient_checkpointing_refused_by_a_model_without():
    assert build_model("deit_nano_patch4_32", 5, grad_checkpointing=True).grad_checkpointing
    with pytest.raises(OptionError, match="simple_cnn has none") as error:
        build_model("simple_cnn", 5, input_size=32, grad_checkpointing=True)
    assert error.value.option == "grad_checkpointing"


def test_models_of_plugins(monkeypatch):
    class Plain(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean((2, 3)))

    def plugin_plain(num_classes=1000, **kwargs):
        return Plain(3, num_classes)

    def plugin_strict(num_classes=1000, pretrained=False):
        return Plain(3, num_classes)

    for entry in (plugin_plain, plugin_strict):
        monkeypatch.setitem(timm.models._registry._model_entrypoints, entry.__name__, entry)
    model = build_model("plugin_plain", 5)
    assert model(pictures()).shape == (2, 5)
    assert set(model.pretrained_cfg) >= {"mean", "std", "crop_pct", "interpolation"}
    assert summarise(model, 32).parameters == 20
    with pytest.raises(OptionError, match="plugin_strict.*kwargs"):
        build_model("plugin_strict", 5)


# --- published weights --------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """timm's download replaced by files of a folder: hub[repository] = state dict."""
    asked = []

    class Hub(dict):
        requests = asked

    files = Hub()

    def load(repository, *args, **kwargs):
        asked.append(repository)
        torch.save(files[repository], tmp_path / "weights.pth")
        return torch.load(tmp_path / "weights.pth", weights_only=True)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", load)
    return files


@pytest.mark.parametrize(
    ("name", "repository", "own_token"),
    [
        ("deit_tiny", "timm/deit_tiny_patch16_224.fb_in1k", 1),
        ("deit_tiny_distilled", "timm/deit_tiny_distilled_patch16_224.fb_in1k", 2),
        ("cait_xxs24_224", "timm/cait_xxs24_224.fb_dist_in1k", 0),
    ],
)
def test_published_weights(hub, name, repository, own_token):
    published = timm.create_model(resolve_name(name))
    hub[repository] = published.state_dict()
    same = build_model(name, 1000, pretrained=True)
    assert hub.requests == [repository]
    for key, value in published.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key
    other = build_model(name, 10, input_size=32, pretrained=True, drop_path=0.1)
    assert torch.equal(other.blocks[0].mlp.fc1.weight, published.blocks[0].mlp.fc1.weight)
    assert torch.equal(other.pos_embed[:, :own_token], published.pos_embed[:, :own_token])
    assert other.pos_embed.shape[1] == 4 + own_token
    assert other(pictures())[0].shape[-1] == 10


def test_published_weights_of_timms_other_models(hub):
    published = timm.create_model("resnet10t", num_classes=1000)
    hub["timm/resnet10t.c3_in1k"] = published.state_dict()
    model = build_model("resnet10t", 10, pretrained=True, drop_path=0.1)
    assert torch.equal(model.conv1[0].weight, published.conv1[0].weight)
    assert model.fc.out_features == 10
    assert any(type(module).__name__ == "DropPath" for module in model.modules())


@pytest.mark.parametrize("name", ["deit_tiny", "resnet10t"])
def test_no_network(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(OptionError, match="--finetune FILE") as error:
        build_model(name, 1000, pretrained=True)
    assert error.value.option == "pretrained"


@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "resnet18_cifar"])
def test_nobody_publishes_weights(name):
    with pytest.raises(OptionError, match=f"nobody publishes weights of {name}") as error:
        build_model(name, 10, input_size=32, pretrained=True)
    assert error.value.option == "pretrained"


# --- weights of another model -------------------------------------------------------------------


def test_prefixes_are_stripped():
    source, model = VisionTransformer(**SMALL), VisionTransformer(**SMALL)
    state = {f"module._orig_mod.{key}": value for key, value in source.state_dict().items()}
    report = load_pretrained_weights(model, state)
    assert set(report.loaded) == set(model.state_dict())
    assert not (report.resized or report.skipped or report.missing)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_head_for_other_classes_stays():
    source = VisionTransformer(**SMALL)
    model = VisionTransformer(**(SMALL | {"num_classes": 9}))
    head = model.head.weight.clone()
    report = load_pretrained_weights(model, source.state_dict())
    assert report.skipped == {
        "head.weight": "7×48 in the checkpoint, 9×48 here",
        "head.bias": "7 in the checkpoint, 9 here",
    }
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert "head.weight (7×48 in the checkpoint, 9×48 here)" in report.summary()
    assert report.summary().startswith(f"{len(source.state_dict()) - 2} tensors loaded")


def test_distilled_weights_into_a_plain_model():
    source, model = DistilledVisionTransformer(**SMALL), VisionTransformer(**SMALL)
    report = load_pretrained_weights(model, source.state_dict())
    assert set(report.skipped) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert not report.missing and set(report.resized) == {"pos_embed"}
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(model.pos_embed[:, 1:], source.pos_embed[:, 2:])
    x = pictures()
    features = source.patch_embed(x) + source.pos_embed[:, 2:]
    torch.testing.assert_close(model.patch_embed(x) + model.pos_embed[:, 1:], features)


def test_plain_weights_into_a_distilled_model():
    source, model = VisionTransformer(**SMALL), DistilledVisionTransformer(**SMALL)
    own = model.pos_embed.clone()
    report = load_pretrained_weights(model, source.state_dict())
    assert set(report.missing) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert not report.skipped
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(model.pos_embed[:, 1], own[:, 1])
    assert torch.equal(model.pos_embed[:, 2:], source.pos_embed[:, 1:])


@pytest.mark.parametrize("new", [(64, 64), (16, 16), (32, 64), (48, 16)])
@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "deit_tiny_distilled", "cait_XXS24_224"])
def test_position_embeddings_are_resized(name, new):
    patch = 4 if "patch4" in name else 16
    name = resolve_name(name)
    source = timm.create_model(name, img_size=4 * patch, depth=1)
    new = (new[0] * patch // 16, new[1] * patch // 16)
    model = timm.create_model(name, img_size=new, depth=1)
    prefix = getattr(model, "num_prefix_tokens", 0)
    with torch.no_grad():
        source.pos_embed[:, prefix:] = 0.7
    report = load_pretrained_weights(model, source.state_dict())
    assert model.pos_embed.shape[1] == prefix + model.patch_embed.num_patches
    torch.testing.assert_close(  # a constant embedding stays constant
        model.pos_embed[:, prefix:], torch.full_like(model.pos_embed[:, prefix:], 0.7)
    )
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    rows, columns = model.patch_embed.grid_size
    expected = {} if (rows, columns) == (4, 4) else {"pos_embed": f"4×4 to {rows}×{columns}"}
    assert report.resized == expected


def cubic_matrix(old: int, new: int) -> torch.Tensor:
    """Keys' cubic convolution (a = -0.75), ``old`` to ``new`` samples, borders repeated."""
    matrix = torch.zeros(new, old)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for tap in range(int(place // 1) - 1, int(place // 1) + 3):
            t, a = abs(place - tap), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[row, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


@pytest.mark.parametrize("new", [(8, 8), (2, 7), (24, 3)])
def test_interpolation_is_bicubic(new):
    grid = torch.randn(1, 20, 3)  # 4 × 5
    assert interpolate_grid(grid, (4, 5), (4, 5)) is grid
    rows, columns = cubic_matrix(4, new[0]), cubic_matrix(5, new[1])
    expected = torch.einsum("yr,xc,rcd->yxd", rows, columns, grid[0].unflatten(0, (4, 5)))
    torch.testing.assert_close(interpolate_grid(grid, (4, 5), new)[0], expected.flatten(0, 1))


def test_grid_of_a_checkpoint_that_is_not_square():
    source = VisionTransformer(**(SMALL | {"img_size": (32, 96)}))  # 2 × 6 patches
    with torch.no_grad():  # a function of the column alone
        source.pos_embed[:, 1:] = torch.arange(6.0).repeat(2).view(1, 12, 1)
    model = VisionTransformer(**(SMALL | {"img_size": (64, 192)}))
    report = load_pretrained_weights(model, source.state_dict())
    assert report.resized == {"pos_embed": "2×6 to 4×12"}
    grid = model.pos_embed[0, 1:, 0].view(4, 12)
    torch.testing.assert_close(grid, grid[:1].expand(4, -1))
    assert grid[0, 0] < grid[0, -1]


def test_weights_of_another_model_are_refused():
    deit = VisionTransformer(**SMALL)
    with pytest.raises(CheckpointError, match="belongs to another model: 0 of"):
        load_pretrained_weights(deit, build_model("simple_cnn", 9).state_dict())
    wider = VisionTransformer(**(SMALL | {"embed_dim": 64}))
    with pytest.raises(CheckpointError, match="patch_embed.proj.weight|cls_token"):
        load_pretrained_weights(deit, wider.state_dict())


def test_a_refused_checkpoint_changes_nothing():
    model = VisionTransformer(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_pretrained_weights(model, {"head.bias": torch.ones(7), "epoch": 3})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_is_no_tensor_is_left_out():
    model = VisionTransformer(**SMALL)
    report = load_pretrained_weights(model, model.state_dict() | {"epoch": 3, "head.bias": None})
    assert report.skipped == {"epoch": "not in this model", "head.bias": "not a tensor"}


# --- summarise ----------------------------------------------------------------------------------


def test_summary_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten())
    model.append(nn.Linear(4 * 8 * 8, 5))
    model[0].requires_grad_(False)
    summary = summarise(model, 8)
    assert summary.parameters == 3 * 4 * 9 + 4 * 64 * 5 + 5
    assert summary.macs == 3 * 4 * 9 * 64 + 4 * 64 * 5


def test_summary_leaves_the_model_as_it_was():
    model = build_model("resnet10t", 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summarise(model.train(), 64)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_summary_of_a_model_that_needs_real_values():
    class Peeking(nn.Linear):
        def forward(self, x):
            assert x.sum().item() == 0
            return super().forward(x.mean((2, 3)))

    assert summarise(Peeking(3, 5), 8).macs == 15


@pytest.mark.parametrize("size", [24, 33])
def test_summary_of_an_impossible_size(size):
    model = build_model("deit_nano_patch4_32", 5, input_size=32)
    with pytest.raises(OptionError, match=f"{size} doesn't fit deit_nano.*32×32") as error:
        summarise(model, size)
    assert error.value.option == "input_size"
