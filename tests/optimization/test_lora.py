"""Adapters in training: which layers, what is trained, resume, and what is saved."""

import shutil

import pytest
import torch

import inference
import models
from checkpointing.folder import newer_checkpoints
from config import ModelOptions
from errors import OptionError
from optimization.lora import add_adapters
from tests.runs import PLAIN, assert_close, assert_same_state, newest, train, train_together

LORA = ("--lora", "2", "--lora-alpha", "4", "--epochs", "2", "--model-kwargs", "depth=2")


def test_layers_get_adapters_and_all_but_them_and_the_head_is_fixed() -> None:
    model = models.build_model("deit_nano_patch4_32", 3, input_size=8)
    add_adapters(model, ModelOptions(lora=3, input_size=8, lora_targets=("*.attn.qkv", "fc1")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.partition(".lora_")[0] for name in trained if ".lora_" in name}
    expected = {f"blocks.{i}.{part}" for i in range(6) for part in ("attn.qkv", "mlp.fc1")}
    assert layers == expected
    assert {name for name in trained if ".lora_" not in name} == {"head.weight", "head.bias"}


def test_layers_that_are_not_called_get_none() -> None:
    # CaiT's kernels read the mixing of the heads without calling it; the class head stays whole.
    model = models.build_model("cait_XXS24", 3, input_size=32)
    add_adapters(model, ModelOptions(lora=1, input_size=32))
    given = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert not any("proj_l" in name or "proj_w" in name or "head" in name for name in given)
    assert any("blocks_token_only.0.attn.q." in name for name in given)


def test_pattern_without_a_layer_names_the_nearest() -> None:
    model = models.build_model("deit_nano_patch4_32", 3, input_size=8)
    with pytest.raises(OptionError, match="'qvk' matches no linear layer; did you mean qkv"):
        add_adapters(model, ModelOptions(lora=2, input_size=8, lora_targets=("qvk",)))


def test_resumed_run_equals_one_that_was_not_stopped(images, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(images, whole, *LORA) == 0
    assert train(images, parts, *LORA, "--stop-at-epoch", "1") == 0
    assert train(images, parts, *LORA, "--resume", "auto") == 0
    one, other = newest(whole), newest(parts)
    for entry in ("model", "model_ema"):
        assert one[entry].keys() == other[entry].keys()
        assert all(torch.equal(one[entry][name], x) for name, x in other[entry].items())
    fixed = "blocks.0.attn.qkv.base_layer.weight"
    assert torch.equal(one["model"][fixed], one["model_ema"][fixed])
    model = inference.from_content(one).model
    assert "blocks.0.attn.qkv.weight" in model.state_dict()
    assert train(images, parts, *LORA[2:], "--lora", "3", "--resume", "auto") == 2


def test_sharded_adapters_are_those_of_one_process_and_go_on_exactly(images, tmp_path) -> None:
    """Two processes whose sharded checkpoints of the second epoch are lost in its middle."""
    plain = (*PLAIN, *LORA[:-1], "depth=1", "--unscale-lr")
    assert train(images, tmp_path / "alone", *plain, "--batch-size", "8") == 0
    options = (*plain, "--fsdp", "--save-every-steps", "2", "--keep", "9")
    whole = train_together(images, tmp_path / "parts", *options)
    alone = newest(tmp_path / "alone")
    weights = [inference.from_content(content).model.state_dict() for content in (alone, whole)]
    assert_close({"model": weights[0]}, {"model": weights[1]})
    assert any(x.any() for name, x in whole["model"].items() if ".lora_B" in name)
    assert not any(".lora_" in name for name in weights[1])
    for later in newer_checkpoints(tmp_path / "parts", 1, 16):
        shutil.rmtree(later)
    again = train_together(images, tmp_path / "parts", *options, "--resume", "auto")
    assert_same_state(whole, again)
