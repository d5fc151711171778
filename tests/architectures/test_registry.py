"""Registering models with timm."""

import warnings

import pytest
import timm
import torch
from timm.models import generate_default_cfgs
from torch import nn

import models
from architectures.registry import plain_cfg, published, register

default_cfgs = generate_default_cfgs(
    {
        "tiny_test_registered": plain_cfg(48, first_conv=None),
        "tiny_test_sized.here": plain_cfg(48, fixed_input_size=True),
        "tiny_test_sized.there": plain_cfg(32, fixed_input_size=True, crop_pct=0.5),
        "tiny_test_twice": plain_cfg(32),
    }
)


class Tiny(nn.Module):
    def __init__(self, width: int = 3, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(width, num_classes)


class Sized(Tiny):
    def __init__(self, img_size: tuple[int, int], **kwargs) -> None:
        super().__init__(width=img_size[0], **kwargs)


def test_later_arguments_win():
    register("tiny_test_registered", Tiny, width=5)
    model = timm.create_model("tiny_test_registered", num_classes=2)
    assert model.head.weight.shape == (2, 5)
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert model.pretrained_cfg["architecture"] == "tiny_test_registered"
    assert timm.create_model("tiny_test_registered", width=7).head.in_features == 7


def test_the_size_of_the_configuration_is_the_models():
    register("tiny_test_sized", Sized)
    assert timm.create_model("tiny_test_sized").head.in_features == 48
    tagged = timm.create_model("tiny_test_sized.there")
    assert tagged.head.in_features == 32 and tagged.pretrained_cfg["crop_pct"] == 0.5
    assert timm.create_model("tiny_test_sized", img_size=(16, 16)).head.in_features == 16
    overlay = {"crop_pct": 0.25}
    model = timm.create_model("tiny_test_sized", pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg["crop_pct"] == 0.25


def test_published_configurations_are_taken_over_with_their_places():
    found = generate_default_cfgs(published("cait_xxs24_224", "tiny_test_name"))["tiny_test_name"]
    timms = timm.get_pretrained_cfg("cait_xxs24_224.fb_dist_in1k")
    assert list(found.tags) == ["fb_dist_in1k"] and found.is_pretrained
    assert found.default.hf_hub_id == timms.hf_hub_id == "timm/cait_xxs24_224.fb_dist_in1k"
    differing = {k for k, v in vars(timms).items() if vars(found.default)[k] != v}
    assert differing == {"architecture", "tag"}
    assert list(published("resnet50", "x", "_y"))[:2] == ["x.a1_in1k_y", "x.a1h_in1k_y"]
    assert published("no_such_model", "x") == {}


def test_weights_go_through_the_filter():
    def doubled(state_dict, model):
        assert isinstance(model, Tiny)
        return {key: 2 * value for key, value in state_dict.items()}

    entry = register("tiny_test_registered", Tiny, filter_fn=doubled, width=2, num_classes=3)
    weights = {"head.weight": torch.ones(3, 2), "head.bias": torch.ones(3)}
    overlay = {"state_dict": weights, "num_classes": 3}
    model = entry(pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.head.weight.tolist() == [[2.0, 2.0]] * 3
    with pytest.raises(RuntimeError, match="No pretrained weights exist for tiny_test_registered"):
        entry(pretrained=True)


def test_only_our_own_overwriting_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register("tiny_test_twice", Tiny)
        entry = register("tiny_test_twice", Tiny)
        with pytest.raises(UserWarning, match="Overwriting tiny_test_twice"):
            timm.models.register_model(entry)
    assert timm.models.model_entrypoint("tiny_test_twice") is entry


def test_arguments_of_timms_alone_build_timms_own():
    ours = timm.create_model("deit_tiny_patch16_224", depth=3, drop_rate=0.1, features_only=True)
    assert type(ours.model) is models.VisionTransformer
    theirs = timm.create_model("deit_tiny_patch16_224", depth=1, dynamic_img_size=True).eval()
    assert type(theirs) is timm.models.VisionTransformer
    assert theirs(torch.zeros(1, 3, 48, 64)).shape == (1, 1000)
    with pytest.raises(TypeError, match="no_such_thing"):
        timm.create_model("deit_tiny_patch16_224", no_such_thing=True)
