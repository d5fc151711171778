"""What a model takes, from signatures, against what happens when it is built with it."""

import functools

import pytest
import timm
import torch
from torch import nn

import models
from architectures.arguments import takes_argument
from errors import OptionError

ARGUMENTS = {"drop_rate": 0.1, "drop_path_rate": 0.1, "drop_block_rate": 0.1, "img_size": None}
NAMES = (
    # of this project
    *("deit_nano_distilled_patch4_32", "cait_XXS24_224", "resnet18_cifar", "simple_cnn"),
    # whose classes name their arguments
    *("resnet10t", "vgg11", "mobilenetv3_small_050", "efficientnet_b0", "xcit_nano_12_p16_224"),
    *("swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s32_224", "ghostnet_050"),
    # whose classes have a configuration or pass their arguments on
    *("regnetx_002", "mobileone_s0", "nf_regnet_b0", "cspdarknet53", "coatnet_0_224"),
    *("levit_128s", "naflexvit_base_patch16_gap", "efficientvit_m0"),
    # whose classes take any keyword and refuse most
    *("hrnet_w18_small", "ese_vovnet19b_slim", "poolformer_s12"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_takes_what_it_can_be_built_with(name):
    size = timm.get_pretrained_cfg(name).input_size[-1] if timm.get_pretrained_cfg(name) else 32
    for argument, value in ARGUMENTS.items():
        with torch.device("meta"):
            build = functools.partial(timm.create_model, name, **{argument: value or size})
            if takes_argument(name, argument):
                build()
            else:
                with pytest.raises(TypeError, match=argument):
                    build()


def test_asking_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert takes_argument("resnet14t", "drop_rate")
    assert torch.equal(torch.get_rng_state(), before)


def register(monkeypatch, entry) -> str:
    monkeypatch.setitem(timm.models._registry._model_entrypoints, entry.__name__, entry)
    return entry.__name__


def test_plugins_name_arguments_in_the_function_or_the_class(monkeypatch):
    class Wide(nn.Linear):
        def __init__(self, num_classes: int, drop_rate: float = 0.0) -> None:
            super().__init__(3, num_classes)

    def by_class(pretrained=False, num_classes=1000, **kwargs):
        return Wide(num_classes)

    def by_function(pretrained=False, num_classes=1000, img_size=224, **kwargs):
        return nn.Linear(3, num_classes)

    name = register(monkeypatch, by_class)
    assert takes_argument(name, "drop_rate") and not takes_argument(name, "drop_path_rate")
    name = register(monkeypatch, by_function)
    assert takes_argument(name, "img_size") and not takes_argument(name, "drop_rate")


def test_a_plugin_that_needs_real_values_to_be_built(monkeypatch):
    class Peeking(nn.Linear):
        def __init__(self, drop_path_rate: float = 0.0) -> None:
            super().__init__(3, 2)
            assert self.weight.abs().sum().item() > 0

    def peeking(pretrained=False, **kwargs):
        return Peeking()

    before = torch.get_rng_state()
    assert takes_argument(register(monkeypatch, peeking), "drop_path_rate")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plugin_that_timm_cannot_call(monkeypatch):
    def strict(num_classes=1000, pretrained=False):
        return nn.Linear(3, num_classes)

    with pytest.raises(OptionError, match=r"--model: strict can't be built.*\*\*kwargs"):
        takes_argument(register(monkeypatch, strict), "drop_rate")


def test_a_plugin_that_does_not_take_the_cache_folder(monkeypatch):
    def older(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, num_classes=10):
        return nn.Linear(3, num_classes)

    with pytest.raises(OptionError, match=r"older can't be built.*cache_dir.*\*\*kwargs"):
        takes_argument(register(monkeypatch, older), "drop_rate")


def test_plugins_that_hand_their_arguments_on(monkeypatch):
    class Sized(nn.Linear):
        def __init__(self, num_classes: int, img_size: int = 32, drop_rate: float = 0.0) -> None:
            super().__init__(3 * img_size**2, num_classes)

    def given(kwargs):
        return {k: v for k, v in kwargs.items() if k in ("num_classes", "img_size", "drop_rate")}

    def passing(num_classes, pretrained=False, **kwargs):
        return Sized(num_classes, **given(kwargs))

    def wrapping(num_classes, pretrained=False, **kwargs):
        return nn.Sequential(nn.Flatten(), Sized(num_classes, **given(kwargs)))

    def demanding(num_classes, pretrained=False, **kwargs):
        return Sized(num_classes, kwargs["img_size"])

    assert takes_argument(register(monkeypatch, passing), "drop_rate", 10)
    assert takes_argument(register(monkeypatch, wrapping), "img_size", 10)
    assert takes_argument(register(monkeypatch, demanding), "img_size", 10)
    built = models.build_model("wrapping", 10, input_size=64, required=("input_size",))
    assert built(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
