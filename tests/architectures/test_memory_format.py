"""Which models go channels-last, and how."""

import copy

import pytest
import timm
import torch

import models
from architectures.memory_format import to_channels_last, wants_channels_last


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", True),
        ("convnext_atto", True),
        ("lambda_resnet26t", True),
        ("deit_nano_patch4_32", False),
        ("cait_xxs24_224", False),
    ],
)
def test_convolutional_networks_go_channels_last(name, expected):
    model = models.build_model(name, 3, input_size=224 if "224" in name else 32)
    assert wants_channels_last(model, None) is expected
    assert wants_channels_last(model, not expected) is not expected


@pytest.mark.parametrize("name", ["resnet10t", "lambda_resnet26t"])
def test_only_weights_of_four_dimensions_are_laid_out_anew(name):
    """A LambdaNet has weights of five, which ``Module.to`` refuses."""
    torch.manual_seed(0)
    before = timm.create_model(name, num_classes=3).eval()
    after = to_channels_last(copy.deepcopy(before))
    for (key, old), new in zip(
        before.state_dict().items(), after.state_dict().values(), strict=True
    ):
        assert torch.equal(old, new), key
        if old.ndim == 4:
            assert new.is_contiguous(memory_format=torch.channels_last), key
        else:
            assert new.stride() == old.stride(), key
    dimensions = {p.ndim for p in after.parameters()}
    assert (5 in dimensions) == name.startswith("lambda")
    images = torch.randn(2, 3, 64, 64)
    wanted = before(images)
    given = after(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)
    given.sum().backward()
    assert all(p.grad is not None for p in after.parameters())
