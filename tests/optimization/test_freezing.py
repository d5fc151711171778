"""Which parameters are trained in which epoch."""

import pytest
import torch
from tiny_models import tiny_vit
from torch import nn

from errors import OptionError
from optimization.freezing import Freezer, frozen_norms


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezer_is_a_function_of_the_epoch():
    model = tiny_vit()
    everything = trained(model)
    freezer = Freezer(model, ["*"], ["0:head", "2:blocks.2.*", "4:blocks.*"])
    assert freezer.apply(0) is True
    assert trained(model) == {"head.weight", "head.bias"}
    assert freezer.apply(1) is False
    assert freezer.apply(5) is True
    late = trained(model)
    assert late == {n for n in everything if n.startswith(("blocks.", "head."))}
    freezer.apply(2)
    assert trained(model) == {n for n in everything if n.startswith(("blocks.2.", "head."))}


@pytest.mark.parametrize("pattern", ["blocks.1", "blocks.1.*", "blocks.1."])
def test_freeze_patterns_name_modules_or_globs(pattern):
    model = tiny_vit()
    everything = trained(model)
    Freezer(model, [pattern]).apply(0)
    assert everything - trained(model) == {n for n in everything if n.startswith("blocks.1.")}


def test_freezing_drops_gradients_and_respects_what_the_model_fixes():
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    Freezer(model, ["patch_embed"], ["3:patch_embed"]).apply(0)
    assert model.patch_embed.proj.weight.grad is None
    assert model.head.weight.grad is not None
    assert "pos_embed" not in trained(model)


def test_bad_freezing_raises():
    model = tiny_vit()
    with pytest.raises(OptionError, match=r"--freeze: 'block\.1' matches no parameter.*blocks\.1"):
        Freezer(model, ["block.1"])
    with pytest.raises(OptionError, match="--unfreeze-at: 'head' matches no frozen parameter"):
        Freezer(model, ["blocks"], ["3:head"])
    with pytest.raises(OptionError, match="--freeze: leaves nothing"):
        Freezer(model, ["*"], ["1:head"])


@pytest.mark.parametrize("distilled", [False, True])
def test_attention_only(distilled):
    model = tiny_vit(distilled)
    everything = trained(model)
    Freezer(model, attn_only=True).apply(0)
    heads = ("head.", "head_dist.")
    assert trained(model) == {
        n for n in everything if ".attn." in n or n.startswith(heads) or n == "pos_embed"
    }
    assert "blocks.0.norm1.weight" in everything - trained(model)
    with pytest.raises(OptionError, match="--attn-only"):
        Freezer(nn.Linear(2, 2), attn_only=True)


def test_frozen_norms_are_those_with_statistics_and_no_trained_parameter():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Linear(2, 2))
    model.append(nn.BatchNorm2d(2, affine=False))
    assert frozen_norms(model) == []
    Freezer(model, ["0", "1.weight", "2"]).apply(0)
    assert frozen_norms(model) == [model[0]]


def test_a_bare_star_that_the_shell_made_files_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LICENSE").touch()
    with pytest.raises(OptionError, match=r"--freeze: 'LICENSE' .* with \* must be quoted"):
        Freezer(tiny_vit(), ["LICENSE"])
