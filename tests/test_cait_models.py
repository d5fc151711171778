"""CaiT against timm's implementation, the published sizes and plain formulas.

Also of architectures/layers.py.
"""

import pytest
import timm
import torch
from timm.models import cait as timm_cait
from timm.models import group_parameters
from tiny_models import randomise
from torch import nn

import cait_models
from architectures.layers import Mlp
from architectures.summary import summarise
from cait_models import (
    Attention_talking_head,
    CaiT,
    Class_Attention,
    LayerScale_Block,
    LeanMlp,
)

VARIANTS = list(cait_models.TIMM_NAMES.items())
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


@pytest.mark.parametrize(("name", "timm_name"), VARIANTS)
def test_state_dict_is_that_of_the_published_checkpoint(name, timm_name):
    with torch.device("meta"):
        ours = timm.create_model(name)
        theirs = getattr(timm_cait, timm_name)()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert ours.pretrained_cfg["hf_hub_id"] == theirs.pretrained_cfg["hf_hub_id"]


@pytest.mark.parametrize(("name", "timm_name"), VARIANTS)
def test_layer_scale_starts_where_the_paper_says(name, timm_name):
    ours = timm.create_model(name, depth=1, img_size=32)
    theirs = getattr(timm_cait, timm_name)(depth=1, img_size=32)
    for key in ("blocks.0.gamma_1", "blocks_token_only.0.gamma_2"):
        assert torch.equal(ours.state_dict()[key], theirs.state_dict()[key])


@pytest.mark.parametrize("kwargs", [{}, {"img_size": (32, 64), "mlp_ratio": 2.0}])
def test_logits_equal_timms(kwargs):
    ours = CaiT(**(SMALL | kwargs)).eval()
    theirs = timm_cait.Cait(
        **(SMALL | {"mlp_ratio_token_only": kwargs.get("mlp_ratio", 4.0)} | kwargs)
    )
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    height, width = ours.patch_embed.img_size
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    expected = theirs.eval()(x)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("cait_XXS24_224", 11.96, 2.53),
        ("cait_XXS36_224", 17.30, 3.77),
        ("cait_S24_224", 46.92, 9.35),
        ("cait_XXS24", 12.03, 9.63),
        ("cait_XXS36", 17.37, 14.35),
        ("cait_XS24", 26.67, 19.28),
        ("cait_S24", 47.06, 32.17),
        ("cait_S36", 68.37, 47.99),
        ("cait_M36", 271.22, 173.1),
        ("cait_M48", 356.46, 329.4),
    ],
)
def test_published_sizes(name, millions, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    summary = summarise(model, model.patch_embed.img_size[0])
    assert summary.parameters / 1e6 == pytest.approx(millions, abs=0.006)
    assert summary.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_talking_heads_follow_the_formula():
    """Equations 1 to 8 of the paper on talking heads, head by head."""
    layer = Attention_talking_head(12, num_heads=3)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).view(2, 5, 3, 3, 4).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4**0.5
    scores = torch.einsum("gh,bhnm->bgnm", layer.proj_l.weight, scores)
    scores = scores + layer.proj_l.bias[:, None, None]
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    weights = torch.einsum("gh,bhnm->bgnm", layer.proj_w.weight, weights)
    weights = weights + layer.proj_w.bias[:, None, None]
    heads = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    torch.testing.assert_close(layer(x), layer.proj(heads.flatten(2)))


def test_dropout_of_talking_heads_only_in_training():
    layer = Attention_talking_head(12, num_heads=3, attn_drop=0.5)
    x = torch.randn(2, 50, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_class_attention_follows_the_formula():
    layer = Class_Attention(12, num_heads=3)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    heads = []
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        q, k, v = (
            x @ linear.weight[rows].T + linear.bias[rows] for linear in (layer.q, layer.k, layer.v)
        )
        weights = (q[:, :1] @ k.transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def mlp_gradients(layer: nn.Module, x: torch.Tensor, amp: bool = False) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = layer(x)
    loss = y.float().square().sum() if amp else y.square().sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


def test_mlp_that_recomputes_has_the_same_gradients():
    plain, lean = Mlp(6, 24).double(), LeanMlp(6, 24).double()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    for ours, expected in zip(mlp_gradients(lean, x), mlp_gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, expected)
    plain, lean, x = plain.float(), lean.float(), x.detach().float().requires_grad_()
    amp = zip(mlp_gradients(lean, x, True), mlp_gradients(plain, x, True), strict=True)
    for ours, expected in amp:
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_mlp_keeps_its_hidden_values_once():
    kept = []
    x = torch.randn(2, 5, 6)
    for layer in (Mlp(6, 24), LeanMlp(6, 24), LeanMlp(6, 24, drop=0.5)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            layer(x)
        kept.append(sizes.count(2 * 5 * 24))
    assert kept[:2] == [2, 1]
    assert kept[2] > 1  # with dropout it is the plain MLP


def test_stochastic_depth_is_the_same_in_all_blocks_and_none_on_the_class_token():
    model = CaiT(**SMALL, drop_path_rate=0.2, drop_rate=0.1)
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.2] * 3
    for block in model.blocks_token_only:
        assert isinstance(block.drop_path, nn.Identity)
        assert block.mlp.drop1.p == 0
    assert model.blocks[0].mlp.drop1.p == model.pos_drop.p == 0.1


def test_layer_scale_block_at_zero_is_the_identity():
    block = LayerScale_Block(12, num_heads=3, init_values=0.0)
    x = torch.randn(2, 4, 12)
    assert torch.equal(block(x), x)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = CaiT(**SMALL)
    randomise(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    gradients, runs = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert runs == [False, True, True]  # the second time in the backward pass
    for name, gradient in gradients[0].items():
        # The softmax cancels a bias that is the same for all keys.
        assert gradient.abs().sum() > 0 or name.endswith("proj_l.bias"), name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_layers_for_layer_decay():
    layers = group_parameters(CaiT(**SMALL), CaiT(**SMALL).group_matcher(), reverse=True)
    expected = {
        "pos_embed": 0,
        "cls_token": 0,
        "patch_embed.proj.weight": 0,
        "blocks.0.attn.qkv.weight": 1,
        "blocks.2.gamma_1": 3,
        "blocks_token_only.0.attn.q.weight": 4,
        "blocks_token_only.1.attn.q.weight": 5,
        "norm.weight": 5,
        "head.weight": 6,
    }
    assert {name: layers[name] for name in expected} == expected


def test_head_can_be_replaced():
    model = CaiT(**SMALL)
    model.reset_classifier(5)
    assert model.get_classifier() is model.head
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    model.reset_classifier(0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 48)
    assert model.forward_head(torch.zeros(2, 5, 48), pre_logits=True).shape == (2, 48)
    with pytest.raises(ValueError, match="max"):
        model.reset_classifier(5, "max")


def test_embeddings_have_no_weight_decay():
    assert CaiT(**SMALL).no_weight_decay() == {"pos_embed", "cls_token"}


def test_another_size_is_refused():
    model = CaiT(**SMALL)
    with pytest.raises(ValueError, match="32×32 pixels, the images have 32×48"):
        model(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match="patches of 16"):
        CaiT(**(SMALL | {"img_size": 40}))


def test_names_come_in_the_published_order_and_parameters_in_the_old_one():
    """The first is that of facebookresearch/deit; optimisers in checkpoints count by the second."""
    model = CaiT(**SMALL)
    names = [key for key in model.blocks[1].attn.state_dict() if key.endswith("weight")]
    assert names == ["qkv.weight", "proj.weight", "proj_l.weight", "proj_w.weight"]
    names = [key for key, _ in model.blocks[1].attn.named_parameters() if key.endswith("weight")]
    assert names == ["qkv.weight", "proj_l.weight", "proj_w.weight", "proj.weight"]
