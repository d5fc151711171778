"""build_model: names, the options a model takes, sizes, plugins and published weights."""

import logging

import huggingface_hub.constants
import pytest
import timm
import timm.models._builder
import torch
from torch import nn

import models  # noqa: F401 (registers ours)
from architectures.factory import build_model, resolve_name
from architectures.summary import summarise
from errors import OptionError


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


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
    caplog.set_level(logging.INFO)
    with torch.device("meta"):
        build_model(name, 5, input_size=32, **{option: 0.1})
        assert f"--{option.replace('_', '-')} is left out" in caplog.text
        caplog.clear()
        build_model(name, 5, input_size=32, **{option: 0.0}, required=(option, "input_size"))
        assert not caplog.text
        with pytest.raises(OptionError, match=f"{name} takes no {option}_rate") as error:
            build_model(name, 5, input_size=32, **{option: 0.1}, required=(option,))
    assert error.value.option == option


def test_unknown_argument_of_a_model_with_kwargs(caplog):
    """Its class takes ``**kwargs`` and refuses what it doesn't know."""
    caplog.set_level(logging.INFO)
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
    assert model(images()).shape == (2, 5)
    assert set(model.pretrained_cfg) >= {"mean", "std", "crop_pct", "interpolation"}
    assert summarise(model, 32).parameters == 20
    with pytest.raises(OptionError, match="plugin_strict.*kwargs"):
        build_model("plugin_strict", 5)


# --- published weights ----------------------------------------------------------------------------


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
    assert other(images())[0].shape[-1] == 10


def test_published_weights_of_timms_other_models(hub):
    published = timm.create_model("resnet10t", num_classes=1000)
    hub["timm/resnet10t.c3_in1k"] = published.state_dict()
    model = build_model("resnet10t", 10, pretrained=True, drop_path=0.1)
    assert torch.equal(model.conv1[0].weight, published.conv1[0].weight)
    assert model.fc.out_features == 10
    assert any(type(module).__name__ == "DropPath" for module in model.modules())


@pytest.mark.parametrize("num_classes", [1000, 10])
def test_published_weights_that_lack_a_part(hub, num_classes):
    """timm itself looks only where the classes are the published ones."""
    weights = timm.create_model("resnet10t").state_dict()
    hub["timm/resnet10t.c3_in1k"] = {n: x for n, x in weights.items() if "layer3" not in n}
    with pytest.raises(OptionError, match="don't fill the model .*layer3") as error:
        build_model("resnet10t", num_classes, pretrained=True)
    assert error.value.option == "pretrained"


def test_published_weights_at_another_size(hub):
    """timm refuses LeViT's; a layer over all patches fits no other number of them."""
    hub["timm/levit_128s.fb_dist_in1k"] = timm.create_model("levit_128s").state_dict()
    model = build_model("levit_128s", 1000, pretrained=True, input_size=288)
    assert model.stages[0].blocks[0].attn.attention_biases.shape == (4, 18 * 18)
    hub["timm/resmlp_12_224.fb_in1k"] = timm.create_model("resmlp_12_224").state_dict()
    with pytest.raises(OptionError, match="--input-size 224"):
        build_model("resmlp_12_224", 1000, pretrained=True, input_size=288)


@pytest.mark.parametrize("name", ["deit_tiny", "resnet10t"])
def test_no_network(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(OptionError, match="--finetune FILE") as error:
        build_model(name, 1000, pretrained=True)
    assert error.value.option == "pretrained"


@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "resnet18_cifar"])
def test_weights_that_are_not_published(name):
    with pytest.raises(OptionError, match=f"no weights of {name} are published") as error:
        build_model(name, 10, input_size=32, pretrained=True)
    assert error.value.option == "pretrained"


def test_the_prefix_of_published_models_is_taken():
    assert resolve_name("timm/resnet50.a1_in1k") == "resnet50.a1_in1k"
    assert resolve_name("timm/deit_tiny") == "deit_tiny_patch16_224"


def test_naflexvit_takes_square_images_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    with torch.device("meta"):
        for name in ("naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"):
            model = build_model(name, 5, input_size=48)
            assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 5)
            assert f"{name} takes square images of one size here" in caplog.text
        caplog.clear()
        build_model("vit_tiny_patch16_224", 5, input_size=48)
    assert "square images" not in caplog.text
