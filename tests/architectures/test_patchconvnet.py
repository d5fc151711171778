"""PatchConvNet: the pooling by its formula, any size, a token for each class, published weights."""

import pytest
import timm
import torch
from timm.layers import DropPath
from tiny_models import randomise
from torch import Tensor, nn

import models
from architectures.weights import load_pretrained_weights


def tiny(name: str = "S60", **options: object) -> nn.Module:
    options = {"depth": 2, "embed_dim": 32, "num_classes": 5} | options
    model = timm.create_model(name, **options)
    randomise(model)
    return model.eval()


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def pooled(model: nn.Module, x: Tensor, query: Tensor, read_class: bool) -> Tensor:
    """Section 3 for one class token: (D,), of (N, D) patches. With one head."""
    [block] = model.blocks_token_only
    q, patches = block.norm1(query), block.norm1(x)
    read = torch.cat((q[None], patches)) if read_class else patches
    weights = (block.attn.k(read) @ block.attn.q(q) * len(q) ** -0.5).softmax(0)
    query = query + block.gamma_1 * block.attn.proj(weights @ block.attn.v(read))
    hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(query)))
    return model.norm(query + block.gamma_2 * block.mlp.fc2(hidden))


def test_the_pooling_is_attention():
    model = tiny()
    for i, features in enumerate(model.forward_features(images())):
        x = features.flatten(1).T
        expected = model.head(pooled(model, x, model.cls_token[0, 0], read_class=True))
        torch.testing.assert_close(model(images())[i], expected, atol=1e-4, rtol=1e-4)


def test_each_class_may_have_its_own_attention():
    model = tiny("S60_multi")
    for i, features in enumerate(model.forward_features(images())):
        x = features.flatten(1).T
        tokens = [pooled(model, x, query, read_class=False) for query in model.cls_token[0]]
        expected = torch.cat([layer(y) for layer, y in zip(model.head, tokens, strict=True)])
        torch.testing.assert_close(model(images())[i], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["S60", "S60_multi"])
def test_images_of_any_size(name):
    model = tiny(name)
    _, [first, last] = model.forward_intermediates(images(48, 100))
    assert first.shape == last.shape == (2, 32, 3, 7)
    assert torch.equal(last, model.forward_features(images(48, 100)))
    assert model(images(48, 100)).shape == (2, 5)
    last_tokens = model.forward_intermediates(images(48, 100), 1, output_fmt="NLC")[1][0]
    assert torch.equal(last_tokens, last.flatten(2).mT)


@pytest.mark.parametrize("name", ["S60", "S60_multi"])
def test_heads_can_be_replaced(name):
    model = tiny(name)
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    assert model.cls_token.shape[1] == (9 if name == "S60_multi" else 1)
    model.reset_classifier(0)
    assert model(images()).shape == (2, 32)
    features = model.forward_features(images())
    assert torch.equal(model(images()), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), features)
    assert tiny(name, num_classes=0)(images()).shape == (2, 32)
    with pytest.raises(ValueError, match="avg"):
        tiny(name, global_pool="avg")


@pytest.mark.parametrize("name", ["S60", "S60_multi"])
def test_published_weights_are_fitted(name):
    source = tiny(name)
    weights = {f"module.{key}": x for key, x in source.state_dict().items()}
    overlay = {"state_dict": {"model": weights}, "url": "", "num_classes": 5}
    if name == "S60_multi":
        overlay["classifier"] = tuple(f"head.{i}" for i in range(5))
    options = {"depth": 2, "embed_dim": 32, "pretrained": True, "pretrained_cfg_overlay": overlay}
    same = timm.create_model(name, num_classes=5, **options).eval()
    assert torch.equal(same(images()), source(images()))
    other = timm.create_model(name, num_classes=3, **options).eval()
    assert torch.equal(other.forward_features(images()), source.forward_features(images()))
    assert other(images()).shape == (2, 3)
    assert torch.equal(other.norm.weight, source.norm.weight)


@pytest.mark.parametrize("count", [3, 9])
def test_a_head_for_other_classes_is_left_out_whole(count):
    """Its first layers would fit, and belong to other classes."""
    model, source = tiny("S60_multi"), tiny("S60_multi", num_classes=count)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = load_pretrained_weights(model, source.state_dict())
    for name, x in model.state_dict().items():
        of_classes = name.startswith(("head.", "cls_token"))
        assert torch.equal(x, before[name] if of_classes else source.state_dict()[name]), name
        assert (name in report.missing) == of_classes


def test_every_published_file_has_a_configuration():
    """Those of facebookresearch/deit, README_patchconvnet.md."""
    names = ("S60", "S120", "B60", "B120", "L60", "L120", "S60_multi")
    cfgs = [c for name in names for c in timm.models.get_arch_pretrained_cfgs(name).values()]
    files = {(cfg.url.rpartition("/")[2], cfg.input_size[-1]) for cfg in cfgs if cfg.has_weights}
    expected = {(f"{name}_224_1k.pth", 224) for name in ("s60", "s120", "b60", "b120")}
    expected |= {(f"{name}_224_21k.pth", 224) for name in ("s60", "b60", "b120")}
    expected |= {(f"{name}_384_21k.pth", 384) for name in ("s60", "b60", "b120")}
    expected |= {("s60_512_21k.pth", 512)}
    expected |= {(f"s60_multi_{how}_1k.pth", 224) for how in ("scratch", "finetune")}
    assert files == expected


def test_training_draws_the_same_depth_everywhere():
    model = tiny(depth=4, drop_path_rate=0.3, drop_rate=0.2, attn_drop_rate=0.1).train()
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == [0.3] * 4
    [block] = model.blocks_token_only
    assert (block.attn.proj_drop.p, block.mlp.drop1.p, block.attn.attn_drop) == (0.2, 0.2, 0.1)
    features = model.eval().forward_features(images())
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_names():
    assert models.resolve_name("patchconvnet_s60") == models.resolve_name("s60") == "S60"
    assert models.resolve_name("patchconvnet_s60_multi") == "S60_multi"
    assert models.resolve_name("S60.fb_in22k_ft_in1k_384") == "S60.fb_in22k_ft_in1k_384"


def test_initial_values():
    for name, scale in {"S60": 1e-4, "S60_multi": 1e-4, "S120": 1e-6, "L60": 1e-6}.items():
        model = timm.create_model(name, depth=1, embed_dim=64)
        scales = [model.blocks[0].gamma_1, *(model.blocks_token_only[0].gamma_1,)]
        assert all((x == scale).all() for x in scales)
        assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.4)
        assert 0 < model.cls_token.abs().max() < 0.2
