"""How options reach the model: memory layout and compilation."""

import pytest
import torch
from runs import train
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import models
from architectures.factory import wants_channels_last

EPOCH = ("--epochs", "1", "--warmup-epochs", "0", "--no-model-ema")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", True),
        ("convnext_atto", True),
        ("deit_nano_patch4_32", False),
        ("cait_xxs24_224", False),
    ],
)
def test_convolutional_networks_go_channels_last(name, expected):
    model = models.build_model(name, 3, input_size=224 if "224" in name else 32)
    assert wants_channels_last(model, None) is expected
    assert wants_channels_last(model, not expected) is not expected


@pytest.mark.parametrize("options, expected", [((), True), (("--no-channels-last",), False)])
def test_memory_layout_of_a_run(images, tmp_path, options, expected):
    """Of weights and images, in training and in evaluation."""
    layouts = set()

    def note(module: nn.Module, inputs: tuple) -> None:
        first = isinstance(module, nn.Conv2d) and module.in_channels == 3
        if first and len(inputs[0]) > 1:  # not the one image whose operations are counted
            for tensor in (module.weight, inputs[0]):
                last = tensor.is_contiguous(memory_format=torch.channels_last)
                layouts.add((module.training, last))

    hook = register_module_forward_pre_hook(note)
    try:
        convolutional = ("--model", "resnet10t", "--input-size", "32", "--eval-batch-size", "4")
        assert train(images, tmp_path, *EPOCH, *convolutional, *options) == 0
    finally:
        hook.remove()
    assert layouts == {(True, expected), (False, expected)}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_mode_reaches_the_compiler(images, tmp_path, mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **how: asked.append(how) or module)
    assert train(images, tmp_path / "plain", *EPOCH) == 0
    assert not asked
    assert train(images, tmp_path / "run", *EPOCH, "--compile", "--compile-mode", mode) == 0
    assert asked and all(how == {"mode": mode} for how in asked)
