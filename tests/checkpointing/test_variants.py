"""The form of a model between options, checkpoints and :class:`Variant`."""

import pytest

from architectures.variant import PLAIN, Variant
from checkpointing.variants import form_options, saved_variant, variant_of
from errors import CheckpointError, OptionError

OPTIONS = {
    "model": "resnet18",
    "model_kwargs": ("depth=2", "act_layer=gelu"),
    "global_pool": "avg",
    "bn_momentum": None,
    "bn_eps": 1e-3,
}


def test_options_of_the_form_are_those_that_say_something() -> None:
    kept = {name: OPTIONS[name] for name in ("model_kwargs", "global_pool", "bn_eps")}
    assert form_options(OPTIONS) == kept
    assert form_options({"bn_momentum": 0.0, "global_pool": "", "model_kwargs": []}) == {
        "bn_momentum": 0.0
    }


def test_variant_is_the_same_from_options_and_from_a_checkpoint() -> None:
    wanted = Variant({"depth": 2, "act_layer": "gelu"}, global_pool="avg", bn_eps=1e-3)
    saved = {**OPTIONS, "model_kwargs": ["depth=2", "act_layer=gelu"]}
    assert variant_of(OPTIONS) == saved_variant({"config": saved}) == wanted


@pytest.mark.parametrize("content", [{}, {"config": None}, {"config": {"model": "resnet18"}}])
def test_older_checkpoints_are_as_their_name_says(content) -> None:
    assert saved_variant(content) == PLAIN


def test_impossible_values_name_the_option_or_the_file() -> None:
    options = {"bn_eps": "much"}
    with pytest.raises(OptionError, match="--bn-eps"):
        variant_of(options)
    with pytest.raises(CheckpointError, match="an option in it is wrong: --bn-eps"):
        saved_variant({"config": options})
