"""What a run goes on from: odd states are refused before the weights change."""

import copy

import pytest
import torch
from torch import nn

from errors import CheckpointError
from optimization.state import Progress, TrainState
from tools.torture.targets.checkpoints import state_of, update


def state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return state_of(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))


@pytest.fixture
def content() -> dict:
    given = state(1)
    update(given)
    return copy.deepcopy(given.state_dict())


def assert_goes_on(content: dict) -> None:
    """A state that takes over ``content`` makes the second update of one that was left alone."""
    again, whole = state(2), state(1)
    update(whole)
    again.load_state_dict(content)
    for each in (again, whole):
        each.optimizer.zero_grad()
        update(each)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_a_state_goes_on_as_it_was(content):
    assert_goes_on(content)


ODD = {
    "its progress has an odd best": ("progress", "best", "high"),
    "its progress has an odd epoch": ("progress", "epoch", 1.5),
    "its progress has an odd step": ("progress", "step", True),
    "its progress has an odd update": ("progress", "update", 2**63),
    "its progress has an odd sampels": ("progress", "sampels", 1),
    "its scaler has an odd scale": ("scaler", "scale", float("nan")),
    "its scaler has an odd backoff_factor": ("scaler", "backoff_factor", 1e39),
    "its scaler has an odd _growth_tracker": ("scaler", "_growth_tracker", 2**31),
    "its scaler has an odd growth_interval": ("scaler", "growth_interval", True),
    "its exp_avg of parameter 0 is odd": ("optimizer", "state", 0, "exp_avg", torch.zeros(7)),
    "its state of parameter 1 is incomplete": ("optimizer", "state", 1, "exp_avg", "x"),
    "its step of parameter 0 is odd": ("optimizer", "state", 0, "step", "x"),
    "state of a parameter 9": ("optimizer", "state", 9, {}),
    "its amsgrad is a str": ("optimizer", "param_groups", 0, "amsgrad", "x"),
    "its foreach is a Tensor": ("optimizer", "param_groups", 0, "foreach", torch.ones(2)),
    "its maximize is a NoneType": ("optimizer", "param_groups", 0, "maximize", None),
    "its lr is a list": ("optimizer", "param_groups", 0, "lr", [1]),
    "0.weight is torch.int8": ("model", "0.weight", torch.zeros(3, 4, dtype=torch.int8)),
}


@pytest.mark.parametrize("words", ODD)
def test_odd_states_are_refused_before_the_weights_change(content, words):
    *path, name, value = ODD[words]
    place = content
    for key in path:
        place = place[key]
    place[name] = value
    given = state(2)
    before = copy.deepcopy(given.model.state_dict())
    with pytest.raises(CheckpointError, match=words) as caught:
        given.load_state_dict(content)
    assert "\n" not in str(caught.value)
    for key, weights in given.model.state_dict().items():
        assert torch.equal(weights, before[key])


def test_an_optimiser_without_its_moments(content):
    del content["optimizer"]["state"][1]["exp_avg_sq"]
    with pytest.raises(CheckpointError, match="its state of parameter 1 is incomplete"):
        state(2).load_state_dict(content)


def test_a_parameter_group_without_its_learning_rate(content):
    del content["optimizer"]["param_groups"][1]["lr"]
    given = state(2)
    before = copy.deepcopy(given.model.state_dict())
    with pytest.raises(CheckpointError, match="a parameter group has no lr"):
        given.load_state_dict(content)
    assert all(torch.equal(w, before[k]) for k, w in given.model.state_dict().items())


def test_how_an_update_is_computed_is_this_sessions_choice(content):
    """A state of another way to the same numbers, or one that can't be combined with it."""
    for group in content["optimizer"]["param_groups"]:
        group |= {"fused": None, "differentiable": True, "capturable": True, "amsgrad": True}
    assert_goes_on(content)


def test_progress_of_older_checkpoints_lacks_what_is_newer():
    assert Progress.of({"epoch": 3, "best": 50}) == Progress(epoch=3, best=50)
