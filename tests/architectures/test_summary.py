"""Parameters and multiply-accumulates by hand."""

import pytest
import torch
from torch import nn

from architectures.summary import summarise
from errors import OptionError
from models import build_model


def test_summary_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten())
    model.append(nn.Linear(4 * 8 * 8, 5))
    model[0].requires_grad_(False)
    summary = summarise(model, 8)
    assert summary.parameters == 3 * 4 * 9 + 4 * 64 * 5 + 5
    assert summary.macs == 3 * 4 * 9 * 64 + 4 * 64 * 5


def test_summary_leaves_the_model_as_it_was():
    model = build_model("resnet10t", 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summarise(model.train(), 64)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_summary_of_a_model_that_needs_real_values():
    class Peeking(nn.Linear):
        def forward(self, x):
            assert x.sum().item() == 0
            return super().forward(x.mean((2, 3)))

    assert summarise(Peeking(3, 5), 8).macs == 15


@pytest.mark.parametrize("size", [24, 33])
def test_summary_of_an_impossible_size(size):
    model = build_model("deit_nano_patch4_32", 5, input_size=32)
    with pytest.raises(OptionError, match=f"{size} doesn't fit deit_nano.*32×32") as error:
        summarise(model, size)
    assert error.value.option == "input_size"
