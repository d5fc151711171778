"""ResMLP: timm's networks with timm's weights, published weights, sizes, dropout."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import mlp_mixer
from tiny_models import randomise
from torch import nn

from architectures import resmlp
from errors import CheckpointError, OptionError
from models import build_model


def ours(**options: object) -> nn.Module:
    options = {"img_size": 64, "depth": 2, "embed_dim": 32} | options
    return timm.create_model("resmlp_12", **options).eval()


def timms(img_size: int | tuple[int, int] = 64) -> nn.Module:
    shape = {"num_blocks": 2, "embed_dim": 32, "mlp_ratio": 4, "num_classes": 7}
    layers = {"block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine}
    model = mlp_mixer.MlpMixer(img_size=img_size, **shape, **layers)
    randomise(model)
    return model.eval()


def images(height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def published(model: nn.Module, **options: object) -> nn.Module:
    """Ours with the weights of ``model`` as timm loads published ones."""
    overlay = {"state_dict": model.state_dict(), "hf_hub_id": None, "url": "", "num_classes": 7}
    return ours(pretrained=True, pretrained_cfg_overlay=overlay, **options)


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_logits_are_timms(size):
    theirs = timms(size)
    model = published(theirs, img_size=size, num_classes=7)
    x = images(*size)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-4, rtol=1e-4)
    features = model.forward_features(x)
    assert features.shape == (2, 32, size[0] // 16, size[1] // 16)
    tokens = theirs.forward_features(x)
    torch.testing.assert_close(features.flatten(2).mT, tokens, atol=1e-4, rtol=1e-4)


def test_published_weights_are_fitted():
    theirs = timms()
    new_head = published(theirs, num_classes=5)
    assert new_head(images()).shape == (2, 5)
    assert torch.equal(new_head.blocks[1].gamma_2, theirs.blocks[1].ls2)
    grey = published(theirs, num_classes=7, in_chans=1)
    x = images(channels=1)
    torch.testing.assert_close(grey(x), theirs(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    own_names = resmlp.checkpoint_filter_fn(new_head.state_dict(), new_head)
    assert own_names.keys() == new_head.state_dict().keys()


def test_weights_of_another_size_are_refused():
    with pytest.raises(CheckpointError, match=r"16 patches, the model has 24: .* --input-size"):
        published(timms(), num_classes=7, img_size=(64, 96))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="64×64"):
        ours()(images(80, 80))
    with pytest.raises(OptionError, match="--input-size.*multiples of 16"):
        build_model("resmlp_24", 5, input_size=50)


@pytest.mark.parametrize("name", resmlp.TIMM_NAMES)
def test_configurations_are_timms(name):
    timm_name = resmlp.TIMM_NAMES[name]
    tags = [cfg.tag for cfg in timm.models.get_arch_pretrained_cfgs(timm_name).values()]
    assert "fb_in1k" in tags
    for tag in tags:
        mine = timm.get_pretrained_cfg(f"{name}.{tag}").to_dict()
        theirs = timm.get_pretrained_cfg(f"{timm_name}.{tag}").to_dict()
        assert mine["hf_hub_id"] == theirs["hf_hub_id"] == f"timm/{timm_name}.{tag}"
        different = {key for key in mine.keys() | theirs if mine.get(key) != theirs.get(key)}
        assert different == {"architecture", "first_conv", "pool_size"}


def test_training_draws_the_same_depth_everywhere():
    model = ours(depth=4, drop_path_rate=0.3, drop_rate=0.2).train()
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == [0.3] * 4
    assert all(block.mlp.drop1.p == block.mlp.drop2.p == 0.2 for block in model.blocks)
    with torch.no_grad():
        for block in model.blocks:  # or branches would add next to nothing
            block.gamma_1.fill_(1.0)
    assert not torch.equal(model(images()), model(images()))


def test_initial_values():
    """Of the scale: the deeper the smaller (section 2)."""
    scales = {"resmlp_12": 0.1, "resmlp_24": 1e-5, "resmlp_36": 1e-6, "resmlpB_24": 1e-6}
    for name, scale in scales.items():
        model = timm.create_model(name, img_size=32, depth=1, embed_dim=64)
        block = model.blocks[0]
        assert (block.gamma_1 == scale).all() and (block.gamma_2 == scale).all()
        assert (block.norm1.alpha == 1).all() and (block.norm1.beta == 0).all()
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (block.attn.bias == 0).all()
