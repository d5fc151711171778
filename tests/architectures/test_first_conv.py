"""The first convolution of three-channel weights for other channels, beside timm's own result."""

import pytest
import timm
import torch
from timm.models import load_pretrained

import models
from architectures.weights import load_pretrained_weights
from errors import CheckpointError


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet10t", "simple_cnn"])
def test_weights_are_adapted_as_timm_does(name, channels, tmp_path):
    source = models.build_model(name, 3, input_size=32)
    weights = source.state_dict()
    ours = models.build_model(name, 3, input_size=32, in_chans=channels)
    first = ours.pretrained_cfg["first_conv"]
    report = load_pretrained_weights(ours, weights)
    assert report.fitted[f"{first}.weight"] == f"3 to {channels} channels"
    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    theirs = models.build_model(name, 3, input_size=32, in_chans=channels)
    cfg = {"file": str(file), "num_classes": 3, "first_conv": first, "classifier": "head"}
    load_pretrained(theirs, pretrained_cfg=cfg, num_classes=3, in_chans=channels)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_weights_of_other_channels_are_refused():
    weights = models.build_model("simple_cnn", 3, input_size=32, in_chans=5).state_dict()
    with pytest.raises(CheckpointError, match="features.0.0.weight"):
        load_pretrained_weights(models.build_model("simple_cnn", 3, input_size=32), weights)


def test_timm_builds_for_other_channels_too():
    ours = models.build_model("resnet10t", 3, input_size=32, in_chans=4)
    wanted = timm.create_model("resnet10t", num_classes=3, in_chans=4).state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in wanted.items()
    }
