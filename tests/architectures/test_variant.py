"""Models in another form than the one of their name."""

import pytest
import timm
import torch

import models
from architectures.variant import Variant
from errors import OptionError


def test_keywords_build_what_timm_builds_with_them() -> None:
    own = models.build_model(
        "vit_tiny_patch16_224",
        5,
        input_size=32,
        variant=Variant({"depth": 2, "embed_dim": 24, "num_heads": 2}, global_pool="avg"),
    ).eval()
    twin = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=5,
        img_size=32,
        depth=2,
        embed_dim=24,
        num_heads=2,
        global_pool="avg",
    ).eval()
    twin.load_state_dict(own.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(own(images), twin(images))


def test_batch_norm_gets_the_constants() -> None:
    model = models.build_model("resnet18", 3, variant=Variant(bn_momentum=0.2, bn_eps=1e-3))
    assert (model.bn1.momentum, model.layer4[1].bn2.eps) == (0.2, 1e-3)


@pytest.mark.parametrize(
    ("variant", "option", "message"),
    [
        (Variant({"dept": 2}), "model_kwargs", "takes no 'dept': did you mean depth?"),
        (Variant({"depth": "two"}), "model_kwargs", "can't be built with depth='two'"),
        (Variant({"depth": None}), "model_kwargs", "leave it out"),
        (Variant(global_pool="mean"), "global_pool", "can't be built with global_pool='mean'"),
        (Variant(bn_eps=0.1), "bn_eps", "has no batch norm"),
    ],
)
def test_what_the_model_does_not_take_is_named(variant, option: str, message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("?", r"\?")) as caught:
        models.build_model("deit_nano_patch4_32", 3, input_size=8, variant=variant)
    assert caught.value.option == option
