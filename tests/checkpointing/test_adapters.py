"""Adapters merged into the weights of their layers."""

import pytest
import torch
from torch import nn

from checkpointing.adapters import merged
from checkpointing.files import weights_of
from errors import CheckpointError


def adapted(alpha: float) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=alpha, target_modules="0"), model)
    nn.init.normal_(model[0].lora_B["default"].weight)
    return model, dict(model.state_dict())


@pytest.mark.parametrize("alpha", [2, 5])
def test_merged_is_what_peft_merges(alpha: float) -> None:
    model, weights = adapted(alpha)
    found = weights_of({"model": weights, "config": {"lora_alpha": alpha}})
    images = torch.randn(3, 6)
    twin = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    twin.load_state_dict(found)
    torch.testing.assert_close(twin(images), model(images), atol=1e-6, rtol=1e-6)
    model[0].merge()
    torch.testing.assert_close(found["0.weight"], model[0].base_layer.weight)


def test_adapter_without_its_layer_is_refused() -> None:
    _, weights = adapted(2)
    del weights["0.base_layer.weight"]
    with pytest.raises(CheckpointError, match="its adapter of 0 lacks a part"):
        merged(weights, {})
