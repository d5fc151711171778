"""torchvision's weights in timm's models of the same architecture: equal logits."""

import pytest
import timm
import torch
import torchvision

from architectures.position_embeddings import interpolate_grid
from architectures.variant import Variant
from architectures.weights import load_pretrained_weights
from errors import CheckpointError


@pytest.mark.parametrize(
    ("theirs", "ours", "shape", "size"),
    [
        (
            torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5),
            "vit_tiny_patch16_224",
            dict(img_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=24, mlp_ratio=2),
            32,
        ),
        (
            torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5),
            "swin_tiny_patch4_window7_224",
            dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
            64,
        ),
        (
            torchvision.models.ConvNeXt(
                [
                    torchvision.models.convnext.CNBlockConfig(width, width * 2, 1)
                    for width in (8, 16, 32)
                ]
                + [torchvision.models.convnext.CNBlockConfig(64, None, 2)],
                layer_scale=0.5,
                num_classes=5,
            ),
            "convnext_tiny",
            dict(depths=(1, 1, 1, 2), dims=(8, 16, 32, 64)),
            32,
        ),
        (
            torchvision.models.SwinTransformer(
                [4, 4],
                16,
                [2, 2],
                [2, 2],
                [4, 4],
                num_classes=5,
                block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
                downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
            ),
            "swinv2_tiny_window8_256",
            dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
            64,
        ),
        (torchvision.models.efficientnet_b0(num_classes=5), "efficientnet_b0", {}, 32),
        (torchvision.models.mobilenet_v2(num_classes=5), "mobilenetv2_100", {}, 32),
        (torchvision.models.mnasnet0_5(num_classes=5), "mnasnet_050", {}, 32),
        (
            torchvision.models.regnet_y_400mf(num_classes=5),
            "regnety_004",
            {},
            32,
        ),
    ],
)
def test_logits_are_torchvisions(theirs, ours, shape, size) -> None:
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1 or "bias_table" in name or "heads" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    model = timm.create_model(ours, num_classes=5, **shape).eval()
    report = load_pretrained_weights(model, theirs.state_dict())
    assert not report.missing
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("efficientnet_b0", "tf_efficientnet_b0"),
    ],
)
def test_what_differs_names_torchvisions_model(theirs: str, ours: str) -> None:
    weights = torchvision.models.get_model(theirs).state_dict()
    with pytest.raises(CheckpointError, match="--model torchvision/NAME"):
        load_pretrained_weights(timm.create_model(ours), weights)


def test_positions_are_fitted_to_another_size_as_ours_are() -> None:
    theirs = torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=5)
    positions = torch.nn.init.normal_(theirs.encoder.pos_embedding).detach()
    shape = dict(patch_size=8, depth=1, num_heads=2, embed_dim=24, mlp_ratio=2)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=48, **shape)
    assert load_pretrained_weights(model, theirs.state_dict()).fitted == {"pos_embed": "4×4 to 6×6"}
    assert torch.equal(model.pos_embed[:, :1], positions[:, :1])
    grid = interpolate_grid(positions[:, 1:], (4, 4), (6, 6))
    assert torch.equal(model.pos_embed[:, 1:], grid)


def test_another_epsilon_is_named_and_does() -> None:
    """EfficientNet V2's, which timm's model of the same layers hasn't."""
    torch.manual_seed(3)
    theirs = torchvision.models.efficientnet_v2_s(num_classes=5).eval()
    model = timm.create_model("efficientnetv2_s", num_classes=5).eval()
    with pytest.raises(CheckpointError, match="for this model with --bn-eps 0.001"):
        load_pretrained_weights(model, theirs.state_dict())
    Variant(bn_eps=0.001).set_batch_norm(model, "efficientnetv2_s")
    load_pretrained_weights(model, theirs.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-4)
