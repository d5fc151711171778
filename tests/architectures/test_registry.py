"""Registering models with timm."""

import warnings

import pytest
import timm
from torch import nn

from architectures.registry import plain_cfg, register


class Tiny(nn.Module):
    def __init__(self, width: int = 3, num_classes: int = 1000) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)


def test_later_arguments_win():
    register("tiny_test_registered", Tiny, plain_cfg(48), width=5)
    model = timm.create_model("tiny_test_registered", num_classes=2)
    assert model.head.weight.shape == (2, 5)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert model.pretrained_cfg["architecture"] == "tiny_test_registered"
    assert timm.create_model("tiny_test_registered", width=7).head.in_features == 7


def test_a_published_configuration_is_taken_over():
    entry = register("tiny_test_published", Tiny, "deit_tiny_patch16_224")
    published = timm.get_pretrained_cfg("deit_tiny_patch16_224").to_dict()
    assert entry().pretrained_cfg == published
    overlaid = entry(pretrained_cfg="fb_in1k", pretrained_cfg_overlay={"crop_pct": 0.5})
    assert overlaid.pretrained_cfg == published | {"crop_pct": 0.5}
    with pytest.raises(ValueError, match="build_model"):
        entry(pretrained=True)


def test_only_our_own_overwriting_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register("tiny_test_twice", Tiny, plain_cfg(32))
        entry = register("tiny_test_twice", Tiny, plain_cfg(32))
        with pytest.raises(UserWarning, match="Overwriting tiny_test_twice"):
            timm.models.register_model(entry)
    assert timm.models.model_entrypoint("tiny_test_twice") is entry
