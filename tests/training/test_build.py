"""How options reach the model: starting weights, memory layout and compilation."""

import pytest
import torch
from runs import train
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import models

EPOCH = ("--epochs", "1", "--warmup-epochs", "0", "--no-model-ema")


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


@pytest.mark.parametrize("damage", ["a block is missing", "a tensor has another shape"])
def test_weights_that_do_not_fill_the_model_need_consent(images, tmp_path, capsys, damage):
    weights = models.build_model("deit_nano_patch4_32", 3, input_size=8).state_dict()
    if damage == "a block is missing":
        weights = {name: x for name, x in weights.items() if not name.startswith("blocks.2.")}
    else:
        weights["blocks.2.mlp.fc1.bias"] = torch.zeros(7)
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    start = ("--finetune", str(path), *EPOCH)
    assert train(images, tmp_path / "run", *start) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --finetune: ") and "blocks.2." in error
    assert "--allow-partial starts with what fits" in error
    assert train(images, tmp_path / "run", *start, "--allow-partial") == 0
    shown = capsys.readouterr()
    assert "doesn't fill VisionTransformer" in shown.out + shown.err
    for consent in ((), ("--allow-partial",)):
        assert train(images, tmp_path / "eval", *start, *consent, "--eval") == 2
        error = capsys.readouterr().err
        assert "doesn't fill VisionTransformer" in error and "starts with" not in error


def test_weights_of_another_model_are_refused_by_option_and_file(images, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(models.build_model("modern_lenet", 3, input_size=32).state_dict(), path)
    for consent in ((), ("--allow-partial",)):
        assert train(images, tmp_path / "run", "--finetune", str(path), *consent) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --finetune: {path}: the checkpoint belongs to another")
