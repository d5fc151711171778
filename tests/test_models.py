"""DeiT against timm's implementation, and every registered model."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import deit as timm_deit
from timm.models import group_parameters
from tiny_models import randomise
from torch import nn

from architectures.summary import summarise
from models import (
    Attention,
    DistilledVisionTransformer,
    LayerScaleBlock,
    ParallelBlock,
    ParallelLayerScaleBlock,
    VisionTransformer,
    resolve_name,
)

PUBLISHED = [
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
]
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
CLASSES = [VisionTransformer, DistilledVisionTransformer]


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_is_that_of_the_published_checkpoint(name):
    with torch.device("meta"):
        ours = timm.create_model(name)
        theirs = getattr(timm_deit, name)()
    assert type(ours).__module__ == "models"
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    assert ours.pretrained_cfg["hf_hub_id"] == f"timm/{name}.fb_in1k"


@pytest.mark.parametrize("img_size", [32, (32, 64)])
@pytest.mark.parametrize("distilled", [False, True])
def test_logits_equal_timms(distilled, img_size):
    arguments = SMALL | {"img_size": img_size}
    ours = CLASSES[distilled](**arguments)
    their_class = [timm_deit.VisionTransformer, timm_deit.VisionTransformerDistilled][distilled]
    theirs = their_class(**arguments)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x = images(*ours.patch_embed.img_size)
    expected = theirs.eval()(x)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(ours.eval()(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=1e-4
    )
    if distilled:
        theirs.set_distilled_training()
        in_training = ours.train()(x)
        for head, expected_head in zip(in_training, theirs.train()(x), strict=True):
            torch.testing.assert_close(head, expected_head, atol=1e-4, rtol=1e-4)
        assert (in_training[0] - in_training[1]).abs().max() > 0.1
        torch.testing.assert_close((in_training[0] + in_training[1]) / 2, expected)


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("deit_tiny", 5.72, 1.26),
        ("deit_small", 22.05, 4.61),
        ("deit_base", 86.57, 17.58),
        ("deit_tiny_distilled", 5.91, None),
        ("deit_small_distilled", 22.44, None),
        ("deit_base_distilled", 87.34, None),
        ("deit_base_384", 86.86, None),
        ("deit_base_distilled_384", 87.63, None),
    ],
)
def test_published_sizes(name, millions, gmacs):
    with torch.device("meta"):
        model = timm.create_model(resolve_name(name))
    summary = summarise(model, model.patch_embed.img_size[0])
    assert summary.parameters / 1e6 == pytest.approx(millions, abs=0.006)
    if gmacs:
        assert summary.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_attention_follows_the_formula():
    layer = Attention(12, num_heads=3)
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(12, dim=-1)
    heads = [
        (q[..., d] @ k[..., d].transpose(1, 2) / 2).softmax(-1) @ v[..., d]
        for d in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def test_stochastic_depth_grows_linearly():
    model = VisionTransformer(**SMALL, drop_path_rate=0.2, drop_rate=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.1] * (1 + 3 * 3)


def test_dropout_of_attention_only_in_training():
    layer = Attention(12, num_heads=3, attn_drop=0.5)
    x = torch.randn(2, 50, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_initialisation():
    model = DistilledVisionTransformer(num_classes=100, depth=1)
    for name in ("cls_token", "dist_token", "pos_embed", "head.weight", "head_dist.weight"):
        assert model.state_dict()[name].std().item() == pytest.approx(0.02, rel=0.1), name
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0


@pytest.mark.parametrize("distilled", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(distilled):
    model = CLASSES[distilled](**SMALL)
    randomise(model)
    gradients, runs = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        outputs = model(images())
        torch.stack(outputs if distilled else (outputs,)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert runs == [False, True, True]  # the second time in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_layers_for_layer_decay():
    model = DistilledVisionTransformer(**SMALL)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    expected = {
        "pos_embed": 0,
        "dist_token": 0,
        "patch_embed.proj.bias": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.2.mlp.fc2.weight": 3,
        "norm.weight": 3,
        "head.weight": 4,
        "head_dist.bias": 4,
    }
    assert {name: layers[name] for name in expected} == expected
    # As in DeiT's repository, where the distillation token decays.
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


def test_heads_can_be_replaced():
    model = DistilledVisionTransformer(**SMALL).double()
    model.reset_classifier(5)
    assert model.get_classifier() == (model.head, model.head_dist)
    assert [y.shape for y in model(images().double())] == [(2, 5), (2, 5)]
    plain = VisionTransformer(**SMALL)
    plain.reset_classifier(0)
    assert plain(images()).shape == (2, 48)
    tokens = torch.randn(2, 6, 48)
    torch.testing.assert_close(plain.forward_head(tokens, pre_logits=True), tokens[:, 0])
    features = DistilledVisionTransformer(**SMALL).forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(features, tokens[:, :2].mean(1))
    with pytest.raises(ValueError, match="max"):
        plain.reset_classifier(5, "max")


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="32×32 pixels, the images have 48×32"):
        VisionTransformer(**SMALL)(images(48, 32))
    with pytest.raises(ValueError, match="40×32 pixels can't be cut into patches of 16"):
        VisionTransformer(**(SMALL | {"img_size": (40, 32)}))


# --- DeiT III -----------------------------------------------------------------------------------


def branch(block: nn.Module, x: torch.Tensor, norm: str, layer: str, gamma: str) -> torch.Tensor:
    """One of the results that a block adds to ``x``."""
    result = getattr(block, layer)(getattr(block, norm)(x))
    return result * getattr(block, gamma) if hasattr(block, gamma) else result


@pytest.mark.parametrize("kind", [LayerScaleBlock, ParallelBlock, ParallelLayerScaleBlock])
def test_blocks_follow_the_formula(kind):
    block, x = kind(12, num_heads=3), torch.randn(2, 5, 12)
    if hasattr(block, "gamma_1"):
        assert torch.equal(block.gamma_2, torch.full((12,), 1e-4))
    randomise(block)
    y = x + branch(block, x, "norm1", "attn", "gamma_1")
    if kind is not LayerScaleBlock:
        y = y + branch(block, x, "norm11", "attn1", "gamma_1_1")
    z = y + branch(block, y, "norm2", "mlp", "gamma_2")
    if kind is not LayerScaleBlock:
        z = z + branch(block, y, "norm21", "mlp1", "gamma_2_1")
    torch.testing.assert_close(block(x), z)
    dropping = kind(12, num_heads=3, drop_path=1 - 1e-6)  # nothing but the way around
    torch.testing.assert_close(dropping(x), x)
    assert not torch.allclose(dropping.eval()(x), x, atol=1e-6)


def test_a_model_of_deit_3():
    model = timm.create_model(
        "deit_small_patch16_LS", img_size=32, depth=3, drop_rate=0.5, drop_path_rate=0.2
    )
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.2] * 3
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p}
    assert rates == {"head_drop": 0.5}
    assert model.pos_embed.shape == (1, 4, 384)  # the class token has none
    x, tokens = images(), []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0]))
    model.eval()(x)
    assert torch.equal(tokens[0][:, :1], model.cls_token.expand(2, -1, -1))
    torch.testing.assert_close(tokens[0][:, 1:], model.patch_embed(x) + model.pos_embed)


def test_deit_3_has_the_published_weights():
    """timm has a name for each size of the images; here that is a part of the tag."""
    timms = timm.list_pretrained("deit3_*")
    for theirs in timms:
        shape, size, tag = re.fullmatch(r"deit3_(\w+)_(\d+)\.(\w+)", theirs).groups()
        ours = f"deit_{shape}_LS.{tag}" + ("_384" if size == "384" else "")
        cfg, expected = timm.get_pretrained_cfg(ours), timm.get_pretrained_cfg(theirs)
        differing = {key for key, value in vars(expected).items() if vars(cfg)[key] != value}
        assert differing <= {"architecture", "tag"}
        assert cfg.hf_hub_id == f"timm/{theirs}"
        with torch.device("meta"):
            model, published = timm.create_model(ours), timm.create_model(theirs)
        assert model.patch_embed.img_size == published.patch_embed.img_size
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, published)]
        assert counts[0] == counts[1]
    assert len(timm.list_pretrained("deit_*_LS*")) == len(timms) == 16
    assert timm.get_pretrained_cfg("deit_small_patch16_LS").tag == "fb_in1k"


# --- every registered model -----------------------------------------------------------------------

TRANSFORMERS = [name for name in timm.list_models(module="models") if name.startswith("deit_")]
CAIT = timm.list_models(module="cait_models")
# Other tests register models of theirs later.
REGISTERED = timm.list_models(module="models", exclude_filters="tiny_test_*")


def test_the_family_is_registered():
    assert set(PUBLISHED) < set(TRANSFORMERS)
    assert len(TRANSFORMERS) == 33 and len(CAIT) == 10
    assert set(REGISTERED) == set(TRANSFORMERS)
    small = {"resnet18_cifar", "resnet34_cifar", "simple_cnn", "modern_lenet"}
    assert set(timm.list_models(module="small")) == small


@pytest.mark.parametrize("name", TRANSFORMERS + CAIT)
def test_transformer_learns_at_two_sizes(name):
    patch = 14 if "patch14" in name else 16
    width = {"embed_dim": 48, "num_heads": 4} if "_LS" in name else {}
    for size in (2 * patch, 3 * patch):
        shape = {"img_size": size, "depth": 1} | width
        model = timm.create_model(name, num_classes=5, drop_path_rate=0.1, **shape)
        outputs = model(images(size))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(y.shape == (2, 5) for y in outputs)
        sum(F.cross_entropy(y, torch.tensor([1, 4])) for y in outputs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
