"""Parameter groups against timm's, and by hand."""

import pytest
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from tiny_models import tiny_vit
from torch import nn

from errors import OptionError
from optimization.groups import parameter_groups


def by_parameter(groups) -> dict[int, tuple[float, float]]:
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group.get("lr_scale", 1.0), group["weight_decay"])
    return found


@pytest.mark.parametrize("distilled", [False, True])
def test_weight_decay_groups_equal_timms(distilled):
    model = tiny_vit(distilled)
    ours = by_parameter(parameter_groups(model, weight_decay=0.05))
    exempt = model.no_weight_decay()
    theirs = by_parameter(param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt))
    assert ours == theirs
    names = {id(p): n for n, p in model.named_parameters()}
    undecayed = {names[i] for i, (_, decay) in ours.items() if decay == 0}
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= undecayed
    assert "head.weight" not in undecayed and "blocks.0.attn.qkv.weight" not in undecayed


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_layer_decay_groups_equal_timms(decay):
    model = tiny_vit()
    ours = by_parameter(parameter_groups(model, weight_decay=0.05, layer_decay=decay))
    theirs = by_parameter(
        param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay
        )
    )
    assert ours.keys() == theirs.keys()
    for key, pair in ours.items():
        assert pair == pytest.approx(theirs[key])


def test_layer_decay_counts_layers_from_the_head():
    model = tiny_vit()
    scales = by_parameter(parameter_groups(model, weight_decay=0, layer_decay=0.5))
    assert scales[id(model.head.weight)][0] == 1
    assert scales[id(model.blocks[2].attn.qkv.weight)][0] == 0.5
    assert scales[id(model.blocks[0].attn.qkv.weight)][0] == 0.125
    assert scales[id(model.patch_embed.proj.weight)][0] == 0.0625


@pytest.mark.parametrize("distilled", [False, True])
def test_head_scale_multiplies_layer_decay_of_all_heads(distilled):
    model = tiny_vit(distilled)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5, head_lr_scale=10)
    scales = by_parameter(groups)
    heads = [model.head, model.head_dist] if distilled else [model.head]
    plain = by_parameter(parameter_groups(model, weight_decay=0.05, layer_decay=0.5))
    in_heads = {id(p) for head in heads for p in head.parameters()}
    assert len(in_heads) == 2 * len(heads)
    for key, (scale, decay) in scales.items():
        assert scale == plain[key][0] * (10 if key in in_heads else 1)
        assert decay == plain[key][1]


def test_fixed_parameters_are_grouped_too():
    model = tiny_vit().requires_grad_(False)
    everything = {id(p) for p in model.parameters()}
    for decay in (None, 0.7):
        groups = parameter_groups(model, weight_decay=0.1, layer_decay=decay)
        assert set(by_parameter(groups)) == everything


def test_options_that_the_model_cannot_honour_raise():
    model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="--layer-decay"):
        parameter_groups(model, weight_decay=0, layer_decay=0.5)
    with pytest.raises(OptionError, match="--head-lr-scale"):
        parameter_groups(model, weight_decay=0, head_lr_scale=2)
