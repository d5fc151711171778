"""Weights of another model: names of other conventions, and what may be missing or left over."""

import re

import pytest
import timm
import torch
from tiny_models import randomise

from architectures.weights import PartialWeightsError, load_pretrained_weights
from errors import CheckpointError
from models import DistilledVisionTransformer, VisionTransformer, build_model

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


def test_prefixes_are_stripped():
    source, model = VisionTransformer(**SMALL), VisionTransformer(**SMALL)
    state = {f"module._orig_mod.{key}": value for key, value in source.state_dict().items()}
    report = load_pretrained_weights(model, state)
    assert set(report.loaded) == set(model.state_dict())
    assert not (report.fitted or report.skipped or report.missing)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_head_for_other_classes_stays():
    source = VisionTransformer(**SMALL)
    model = VisionTransformer(**(SMALL | {"num_classes": 9}))
    head = model.head.weight.clone()
    report = load_pretrained_weights(model, source.state_dict())
    assert report.skipped == {
        "head.weight": "7×48 in the checkpoint, 9×48 here",
        "head.bias": "7 in the checkpoint, 9 here",
    }
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert "head.weight (7×48 in the checkpoint, 9×48 here)" in report.summary()
    assert report.summary().startswith(f"{len(source.state_dict()) - 2} tensors loaded")


def test_distilled_weights_into_a_plain_model():
    source, model = DistilledVisionTransformer(**SMALL), VisionTransformer(**SMALL)
    report = load_pretrained_weights(model, source.state_dict())
    assert set(report.skipped) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert not report.missing and set(report.fitted) == {"pos_embed"}
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(model.pos_embed[:, 1:], source.pos_embed[:, 2:])
    x = images()
    features = source.patch_embed(x) + source.pos_embed[:, 2:]
    torch.testing.assert_close(model.patch_embed(x) + model.pos_embed[:, 1:], features)


def test_plain_weights_into_a_distilled_model():
    source, model = VisionTransformer(**SMALL), DistilledVisionTransformer(**SMALL)
    own = model.pos_embed.clone()
    report = load_pretrained_weights(model, source.state_dict())
    assert set(report.missing) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert not report.skipped
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(model.pos_embed[:, 1], own[:, 1])
    assert torch.equal(model.pos_embed[:, 2:], source.pos_embed[:, 1:])


def test_weights_of_another_model_are_refused():
    deit = VisionTransformer(**SMALL)
    with pytest.raises(CheckpointError, match="belongs to another model: 0 of"):
        load_pretrained_weights(deit, build_model("simple_cnn", 9).state_dict())
    wider = VisionTransformer(**(SMALL | {"embed_dim": 64}))
    with pytest.raises(CheckpointError, match="patch_embed.proj.weight|cls_token"):
        load_pretrained_weights(deit, wider.state_dict())


def test_a_refused_checkpoint_changes_nothing():
    model = VisionTransformer(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_pretrained_weights(model, {"head.bias": torch.ones(7), "epoch": 3})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_is_no_tensor_is_left_out():
    model = VisionTransformer(**SMALL)
    report = load_pretrained_weights(model, model.state_dict() | {"epoch": 3, "head.bias": None})
    assert report.skipped == {"epoch": "not a tensor", "head.bias": "not a tensor"}


# --- other conventions ----------------------------------------------------------------------------

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 32}


def test_facebooks_deit3_fills_timms():
    """Facebook's files name LayerScale ``gamma_1``, timm ``ls1.gamma``."""
    source = timm.create_model("deit3_small_patch16_224", num_classes=5, **TINY).eval()
    with torch.no_grad():
        for block in source.blocks:
            block.ls1.gamma.uniform_(0.5, 1.5)
    facebooks = {
        re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): x for n, x in source.state_dict().items()
    }
    assert "blocks.1.gamma_2" in facebooks
    model = timm.create_model("deit3_small_patch16_224", num_classes=5, **TINY).eval()
    report = load_pretrained_weights(model, facebooks)
    assert not (report.missing or report.skipped)
    assert torch.equal(model(images()), source(images()))


def test_timms_deit3_fills_facebooks():
    source = timm.create_model("deit3_small_patch16_224", num_classes=5, **TINY).eval()
    model = timm.create_model("deit_small_patch16_LS", num_classes=5, **TINY).eval()
    report = load_pretrained_weights(model, source.state_dict())
    assert not (report.missing or report.skipped)
    torch.testing.assert_close(model(images()), source(images()))


def test_model_with_layer_scale_computes_what_weights_without_did():
    source = timm.create_model("vit_small_patch16_224", num_classes=5, **TINY).eval()
    model = timm.create_model("vit_small_patch16_224", num_classes=5, init_values=1e-5, **TINY)
    report = load_pretrained_weights(model.eval(), source.state_dict())
    assert len(report.fitted) == 4 and not report.missing
    torch.testing.assert_close(model(images()), source(images()))


def test_a_name_mapping_made_for_other_weights_is_passed_over(monkeypatch):
    source, model = VisionTransformer(**SMALL), VisionTransformer(**(SMALL | {"num_classes": 9}))
    model.pretrained_cfg = {"architecture": "deit_tiny_patch16_224"}

    def broken(state_dict, model):
        return {"x": state_dict["a name of its own"]}

    entry = timm.models.model_entrypoint("deit_tiny_patch16_224")
    monkeypatch.setattr(entry, "filter_fn", broken)
    load_pretrained_weights(model, source.state_dict())
    assert torch.equal(model.norm.weight, source.norm.weight)


# --- complete or refused --------------------------------------------------------------------------

# One of each kind that is quick to build: heads, buffers and names differ.
VARIED = (
    "resnet10t",
    "convnext_atto",
    "levit_128s",
    "efficientvit_m0",
    "mobilenetv3_small_050",
    "deit_tiny_distilled_patch16_224",
    "cait_XXS24_224",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
)


def varied(name: str, **changes) -> torch.nn.Module:
    small = {"depth": 2} if name.startswith(("deit", "cait", "vit")) else {}
    small |= {"depths": (1, 1, 1, 1), "embed_dim": 24} if name.startswith("swin") else {}
    return timm.create_model(name, **small | changes)


@pytest.mark.parametrize("name", VARIED)
def test_complete_weights_are_taken_and_mutilated_ones_refused(name):
    source = varied(name)
    weights = source.state_dict()
    model = varied(name)
    report = load_pretrained_weights(model, weights)
    assert not (report.missing or report.skipped or report.fitted)
    assert all(torch.equal(x, weights[n]) for n, x in model.state_dict().items())

    other = varied(name, num_classes=7)
    report = load_pretrained_weights(other, weights)
    heads = tuple(
        f"{n}." for n, m in other.named_modules() if n.startswith(("head", "fc", "class"))
    )
    assert report.missing and all(n.startswith(heads) for n in report.missing)

    learnt = [n for n, p in source.named_parameters() if "head" not in n and "token" not in n]
    learnt = [n for n in learnt if not n.startswith(heads)]
    for victim in (learnt[0], learnt[len(learnt) // 2], learnt[-1]):
        whole = {n: x for n, x in weights.items() if n != victim}
        with pytest.raises(PartialWeightsError, match=re.escape(victim)):
            load_pretrained_weights(model, whole)
        with pytest.raises(PartialWeightsError, match=r"missing \(1\): "):
            load_pretrained_weights(model, whole | {f"other.{victim}": weights[victim]})
        larger = torch.zeros([size + 1 for size in weights[victim].shape])
        with pytest.raises(PartialWeightsError, match=r"left over \(1\): .*here"):
            load_pretrained_weights(model, whole | {victim: larger})
    with pytest.raises(PartialWeightsError, match=r"left over \(1\): another.weight"):
        load_pretrained_weights(model, weights | {"another.weight": torch.zeros(3)})


def test_a_deleted_block_is_refused_unless_that_is_allowed():
    source, model = VisionTransformer(**SMALL), VisionTransformer(**SMALL)
    weights = {n: x for n, x in source.state_dict().items() if not n.startswith("blocks.1.")}
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(PartialWeightsError, match=r"missing \(12\): blocks.1."):
        load_pretrained_weights(model, weights)
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
    report = load_pretrained_weights(model, weights, allow_partial=True)
    assert len(report.missing) == 12 and all(n.startswith("blocks.1.") for n in report.missing)
    assert torch.equal(model.blocks[2].norm1.weight, source.blocks[2].norm1.weight)
    assert torch.equal(model.blocks[1].attn.qkv.weight, before["blocks.1.attn.qkv.weight"])


def test_a_norm_under_another_name_is_refused():
    source = timm.create_model("vit_small_patch16_224", fc_norm=False, **TINY)
    model = timm.create_model("vit_small_patch16_224", fc_norm=True, global_pool="avg", **TINY)
    with pytest.raises(PartialWeightsError, match=r"missing \(2\): fc_norm.*left over \(2\): norm"):
        load_pretrained_weights(model, source.state_dict())


def test_what_is_computed_may_be_missing_or_left_over():
    source = timm.create_model("resnet10t", num_classes=5)
    weights = {n: x for n, x in source.state_dict().items() if "num_batches_tracked" not in n}
    weights["layers.0.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    weights["layers.0.attn_mask"] = torch.zeros(4, 4)
    report = load_pretrained_weights(timm.create_model("resnet10t", num_classes=5), weights)
    assert not (report.missing or report.skipped)
    del weights["bn1.running_var"]
    with pytest.raises(PartialWeightsError, match="bn1.running_var"):
        load_pretrained_weights(timm.create_model("resnet10t", num_classes=5), weights)


def test_classifier_under_another_name_may_be_left_over():
    source = timm.create_model("resnet10t", num_classes=5)
    weights = {re.sub("^fc", "head", n): x for n, x in source.state_dict().items()}
    report = load_pretrained_weights(timm.create_model("resnet10t", num_classes=5), weights)
    assert report.missing == ["fc.weight", "fc.bias"]
    assert report.skipped.keys() == {"head.weight", "head.bias"}


def test_half_a_classifier_is_not_taken():
    """Of one layer for each class the first would fit any number of classes."""

    class Split(VisionTransformer):
        def __init__(self, classes: int) -> None:
            super().__init__(**SMALL)
            self.head = torch.nn.ModuleList(torch.nn.Linear(48, 1) for _ in range(classes))
            self.pretrained_cfg = {"classifier": tuple(f"head.{i}" for i in range(10))}

    source, model = Split(10), Split(4)
    before = model.head[0].weight.clone()
    report = load_pretrained_weights(model, source.state_dict())
    assert torch.equal(model.head[0].weight, before)
    assert len(report.missing) == 8


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_small_patch16_LS"])
def test_model_without_layer_scale_computes_what_the_weights_did(name):
    shape = {"img_size": 32, "depth": 2, "num_classes": 7}
    source = timm.create_model(name, **shape).eval()
    model = timm.create_model("deit_small_patch16_224", **shape).eval()
    randomise(source)
    report = load_pretrained_weights(model, source.state_dict())
    assert not (report.skipped or report.missing)
    assert report.fitted["blocks.1.mlp.fc2.weight"] == "with its LayerScale"
    assert source(images()).std() > 0.1
    torch.testing.assert_close(model(images()), source(images()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "prefix, others",
    [
        ("backbone.", {"head.mlp.0.weight": (3, 3), "head.last_layer.weight_g": (3, 1)}),
        ("base_encoder.", {"momentum_encoder.": None, "queue": (4,)}),
        ("model.", {"criterion.weight": (7,)}),
        ("model.net.", {}),
    ],
    ids=["DINO", "MoCo", "Lightning", "twice"],
)
def test_a_model_inside_of_another_module_is_taken_out(prefix, others, caplog):
    caplog.set_level("INFO")
    source, model = VisionTransformer(**SMALL), VisionTransformer(**SMALL)
    own = source.state_dict()
    state = {f"module.{prefix}{name}": value for name, value in own.items()}
    for name, shape in others.items():
        if shape is None:  # the same model once more, with other weights
            state |= {f"module.{name}{key}": 0 * value for key, value in own.items()}
        else:
            state[f"module.{name}"] = torch.ones(shape)
    report = load_pretrained_weights(model, state)
    assert set(report.loaded) == set(own) and not (report.skipped or report.missing)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert f"the checkpoint's {prefix}* are the model" in caplog.text
    assert ("others are left out" in caplog.text) == bool(others)
