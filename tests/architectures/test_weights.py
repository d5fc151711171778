"""Weights of another model: what fits by name and shape, and position embeddings of other grids."""

import pytest
import timm
import torch

from architectures.weights import interpolate_grid, load_pretrained_weights
from errors import CheckpointError
from models import DistilledVisionTransformer, VisionTransformer, build_model, resolve_name

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width or height, generator=generator)


def test_prefixes_are_stripped():
    source, model = VisionTransformer(**SMALL), VisionTransformer(**SMALL)
    state = {f"module._orig_mod.{key}": value for key, value in source.state_dict().items()}
    report = load_pretrained_weights(model, state)
    assert set(report.loaded) == set(model.state_dict())
    assert not (report.resized or report.skipped or report.missing)
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
    assert not report.missing and set(report.resized) == {"pos_embed"}
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


@pytest.mark.parametrize("new", [(64, 64), (16, 16), (32, 64), (48, 16)])
@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "deit_tiny_distilled", "cait_XXS24_224"])
def test_position_embeddings_are_resized(name, new):
    patch = 4 if "patch4" in name else 16
    name = resolve_name(name)
    source = timm.create_model(name, img_size=4 * patch, depth=1)
    new = (new[0] * patch // 16, new[1] * patch // 16)
    model = timm.create_model(name, img_size=new, depth=1)
    prefix = getattr(model, "num_prefix_tokens", 0)
    with torch.no_grad():
        source.pos_embed[:, prefix:] = 0.7
    report = load_pretrained_weights(model, source.state_dict())
    assert model.pos_embed.shape[1] == prefix + model.patch_embed.num_patches
    torch.testing.assert_close(  # a constant embedding stays constant
        model.pos_embed[:, prefix:], torch.full_like(model.pos_embed[:, prefix:], 0.7)
    )
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    rows, columns = model.patch_embed.grid_size
    expected = {} if (rows, columns) == (4, 4) else {"pos_embed": f"4×4 to {rows}×{columns}"}
    assert report.resized == expected


def cubic_matrix(old: int, new: int) -> torch.Tensor:
    """Keys' cubic convolution (a = -0.75), ``old`` to ``new`` samples, borders repeated."""
    matrix = torch.zeros(new, old)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for tap in range(int(place // 1) - 1, int(place // 1) + 3):
            t, a = abs(place - tap), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[row, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


@pytest.mark.parametrize("new", [(8, 8), (2, 7), (24, 3)])
def test_interpolation_is_bicubic(new):
    grid = torch.randn(1, 20, 3)  # 4 × 5
    assert interpolate_grid(grid, (4, 5), (4, 5)) is grid
    rows, columns = cubic_matrix(4, new[0]), cubic_matrix(5, new[1])
    expected = torch.einsum("yr,xc,rcd->yxd", rows, columns, grid[0].unflatten(0, (4, 5)))
    torch.testing.assert_close(interpolate_grid(grid, (4, 5), new)[0], expected.flatten(0, 1))


def test_grid_of_a_checkpoint_that_is_not_square():
    source = VisionTransformer(**(SMALL | {"img_size": (32, 96)}))  # 2 × 6 patches
    with torch.no_grad():  # a function of the column alone
        source.pos_embed[:, 1:] = torch.arange(6.0).repeat(2).view(1, 12, 1)
    model = VisionTransformer(**(SMALL | {"img_size": (64, 192)}))
    report = load_pretrained_weights(model, source.state_dict())
    assert report.resized == {"pos_embed": "2×6 to 4×12"}
    grid = model.pos_embed[0, 1:, 0].view(4, 12)
    torch.testing.assert_close(grid, grid[:1].expand(4, -1))
    assert grid[0, 0] < grid[0, -1]


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
    assert report.skipped == {"epoch": "not in this model", "head.bias": "not a tensor"}
