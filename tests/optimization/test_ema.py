"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from optimization.ema import ModelEma


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_the_formula(warmup):
    model = nn.Linear(2, 1, bias=False)
    average = ModelEma(model, 0.9, warmup=warmup)
    expected = model.weight.detach().clone()
    for update in range(30):
        with torch.no_grad():
            model.weight += torch.randn(1, 2)
        average.step(update)
        decay = min(0.9, (1 + update) / (10 + update)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.module.weight, expected)
