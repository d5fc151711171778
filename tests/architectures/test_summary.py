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


def test_positions_that_are_looked_up_and_not_there():
    model = build_model("mvitv2_tiny", 5, input_size=112)
    with pytest.raises(OptionError, match="112 doesn't fit mvitv2_tiny: index 5"):
        summarise(model, 112)


class Elsewhere(nn.Linear):
    """Answers with ``form`` of its logits."""

    def __init__(self, form) -> None:
        super().__init__(3, 5)
        self.form = form

    def forward(self, x):
        return self.form(super().forward(x.mean((2, 3))))


@pytest.mark.parametrize(
    "form, shown",
    [
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: (logits, logits), "a tuple"),
        (lambda logits: logits[:, None], "(1, 1, 5)"),
        (lambda logits: logits[:, :4], "(1, 4)"),
    ],
)
def test_what_is_no_logit_for_each_class_is_refused(form, shown):
    assert summarise(Elsewhere(lambda logits: logits), 8, 5).macs == 15
    with pytest.raises(OptionError) as error:
        summarise(Elsewhere(form), 8, 5)
    assert error.value.option == "model"
    assert error.value.message.startswith(f"Elsewhere answers an image with {shown}, not")


def test_an_encoder_of_timm_is_refused():
    with torch.device("meta"):
        model = build_model("qwen3_vit_88m_enc", 5, input_size=32)
    with pytest.raises(OptionError, match=r"qwen3_vit_88m_enc answers .* \(1, 1, 1024\)"):
        summarise(model, 32, 5)


def test_a_model_that_needs_more_than_images_is_refused():
    class Guided(nn.Linear):
        def forward(self, x, guide):
            return super().forward(x.mean((2, 3))) + guide

    with pytest.raises(OptionError, match="Guided needs more than images .*'guide'") as error:
        summarise(Guided(3, 5), 8, 5)
    assert error.value.option == "model"
