"""architectures/dynamic_size.py: one model at several sizes, against models built for each."""

import pytest
import timm
import torch

import models
from architectures.dynamic_size import keywords_for_other_sizes, take_other_sizes
from architectures.weights import load_pretrained_weights


@pytest.mark.parametrize(
    "name",
    [
        "deit_nano_patch4_32",
        "deit_nano_distilled_patch4_32",
        "deit_small_patch16_LS",
        "cait_XXS24",
    ],
)
@pytest.mark.parametrize("size", [(48, 32), (16, 80)])
def test_a_model_answers_as_one_built_for_the_size(name, size):
    torch.manual_seed(0)
    small = {"embed_dim": 48, "depth": 1, "num_heads": 4, "num_classes": 5}
    model = timm.create_model(models.resolve_name(name), img_size=(64, 48), **small).eval()
    built = timm.create_model(models.resolve_name(name), img_size=size, **small).eval()
    load_pretrained_weights(built, model.state_dict(), size=(64, 48))
    images, own = torch.randn(2, 3, *size), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected, before = built(images), model(own)
        with pytest.raises(ValueError, match="built for 64×48"):
            model(images)
        take_other_sizes(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(own), before)
        with pytest.raises(ValueError, match="don't tile"):
            model(images[..., :-1])
    features = model.forward_intermediates(images, intermediates_only=True)
    assert features[-1].shape[-2:] == (size[0] // model.patch_size, size[1] // model.patch_size)


def test_positions_learn_at_other_sizes():
    """Each place of the grid takes part in what the images are given."""
    model = timm.create_model("deit_nano_patch4_32", img_size=32, num_classes=3, depth=1)
    take_other_sizes(model)
    model(torch.randn(1, 3, 16, 24)).sum().backward()
    gradient = model.pos_embed.grad[0, 1:].view(8, 8, -1)
    assert (gradient != 0).any(2).all()


def test_timms_models_are_built_for_other_sizes():
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"):
        assert keywords_for_other_sizes(name, 5) == {"dynamic_img_size": True}
    for name in ("resnet18", "resmlp_12_224", "deit_nano_patch4_32"):
        assert keywords_for_other_sizes(name, 5) == {}
