"""Gradient clipping by hand."""

import math

import pytest
import torch
from torch import nn

from optimization.clipping import clip_gradients


def with_gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.full((2, 2), 3.0)
    parameters[1].grad = torch.tensor([-4.0, 0.0])
    return [*parameters, nn.Parameter(torch.ones(3))]


NORM = math.sqrt(4 * 9 + 16)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_norm_before_clipping_is_returned_in_every_mode(mode):
    assert clip_gradients(with_gradients(), None, mode).item() == pytest.approx(NORM)
    assert clip_gradients(iter(with_gradients()), 0.1, mode).item() == pytest.approx(NORM)
    assert clip_gradients([nn.Parameter(torch.ones(1))], 0.1, mode).item() == 0


def test_no_limit_leaves_gradients_alone():
    parameters = with_gradients()
    clip_gradients(parameters, None)
    assert torch.equal(parameters[0].grad, torch.full((2, 2), 3.0))


def test_clip_by_norm():
    parameters = with_gradients()
    clip_gradients(parameters, 1.3, "norm")
    torch.testing.assert_close(parameters[0].grad, torch.full((2, 2), 3.0 * 1.3 / NORM))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-4.0 * 1.3 / NORM, 0.0]))


def test_clip_by_value():
    parameters = with_gradients()
    clip_gradients(parameters, 3.5, "value")
    torch.testing.assert_close(parameters[0].grad, torch.full((2, 2), 3.0))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-3.5, 0.0]))


def test_adaptive_clipping_limits_each_unit_by_its_weight():
    parameters = with_gradients()
    clip_gradients(parameters, 0.1, "agc")
    # Rows: weight norm √8, gradient norm √18. The vector is one unit: √2 and 4.
    row = 3.0 * 0.1 * math.sqrt(8) / math.sqrt(18)
    torch.testing.assert_close(parameters[0].grad, torch.full((2, 2), row))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-0.1 * math.sqrt(2), 0.0]))
    spared = with_gradients()
    clip_gradients(spared, 0.1, "agc", spared=spared[:1])
    torch.testing.assert_close(spared[0].grad, torch.full((2, 2), 3.0))
    torch.testing.assert_close(spared[1].grad, torch.tensor([-0.1 * math.sqrt(2), 0.0]))
