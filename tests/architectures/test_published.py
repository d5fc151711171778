"""Published weights in our models, through timm: against the models of timm that made them."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import cait as timm_cait
from timm.models import deit as timm_deit
from timm.models import vision_transformer as timm_vit
from tiny_models import randomise

import models  # noqa: F401 (registers ours)

TINY = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
DEIT3 = TINY | {"no_embed_class": True, "init_values": 1e-6}
PAIRS = {
    "deit_tiny_patch16_224": lambda **size: timm_deit.VisionTransformer(**TINY | size),
    "deit_tiny_distilled_patch16_224": lambda **size: timm_deit.VisionTransformerDistilled(
        **TINY | size
    ),
    "deit_tiny_patch16_LS": lambda **size: timm_deit.VisionTransformer(**DEIT3 | size),
    "deit_small_patch16_18x2_LS": lambda **size: timm_vit.VisionTransformer(
        block_fn=timm_vit.ParallelThingsBlock, **DEIT3 | size
    ),
    "cait_XXS24_224": lambda **size: timm_cait.Cait(**TINY | size),
}


@pytest.fixture(params=PAIRS)
def name(request):
    return request.param


def theirs(name: str, **size: int) -> torch.nn.Module:
    model = PAIRS[name](**size).eval()
    randomise(model)
    return model


def pretrained(name: str, weights, **arguments) -> torch.nn.Module:
    overlay = {"state_dict": weights}
    arguments = TINY | {"pretrained": True, "pretrained_cfg_overlay": overlay} | arguments
    return timm.create_model(name, **arguments).eval()


def test_timms_weights_give_timms_logits(name):
    model = theirs(name)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(pretrained(name, model.state_dict())(x), expected)


def test_facebooks_files_are_read(name):
    """Names of a file of theirs: ours, inside "model", some with the prefix of DDP."""
    weights = pretrained(name, theirs(name).state_dict()).state_dict()
    file = {"model": {f"module.{key}": value for key, value in weights.items()}}
    again = pretrained(name, file).state_dict()
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_positions_of_another_size_are_resized_as_deit_does(name):
    weights = theirs(name, img_size=48).state_dict()
    model = pretrained(name, weights, img_size=64)
    prefix = weights["pos_embed"].shape[1] - 9
    patches = weights["pos_embed"][:, prefix:].view(1, 3, 3, 24).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(4, 4), mode="bicubic", align_corners=False)
    expected = patches.permute(0, 2, 3, 1).reshape(1, 16, 24)
    torch.testing.assert_close(model.pos_embed[:, prefix:], expected)
    assert torch.equal(model.pos_embed[:, :prefix], weights["pos_embed"][:, :prefix])


def test_other_channels_classes_and_no_head(name):
    weights = theirs(name).state_dict()
    model = pretrained(name, weights, in_chans=1, num_classes=5)
    expected = weights["patch_embed.proj.weight"].sum(1, keepdim=True)  # timm's rule for grey
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert pretrained(name, weights, num_classes=0)(torch.zeros(2, 3, 32, 32)).shape == (2, 24)


def test_a_file_can_be_given(tmp_path, name):
    weights = theirs(name).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = pretrained(
        name, None, pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")}
    )
    assert torch.equal(model.cls_token, weights["cls_token"])


def test_a_block_that_is_missing_is_an_error(name):
    weights = {k: v for k, v in theirs(name).state_dict().items() if "blocks.1." not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\."):
        pretrained(name, weights)
