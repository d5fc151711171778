"""Position embeddings between models with other tokens, grids and sizes; none is scrambled."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from architectures.position_embeddings import fit_positions, interpolate_grid
from architectures.weights import load_pretrained_weights
from errors import CheckpointError
from models import VisionTransformer, resolve_name

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}

# All kinds of tokens in front of the patches, with positions or without.
KINDS = (
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_small_patch16_LS",
    "cait_S24_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_224",
    "vit_medium_patch16_gap_256",
    "vit_medium_patch16_reg4_gap_256",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_small_patch14_reg4_dinov2",
    "eva02_small_patch14_224",
    "beit3_base_patch16_224",
)


def build(name: str, grid: tuple[int, int], **changes) -> nn.Module:
    patch = 14 if "patch14" in name else 16
    size = (grid[0] * patch, grid[1] * patch)
    small = {"embed_dim": 48, "depth": 1, "num_heads": 4} | changes
    return timm.create_model(name, img_size=size, num_classes=3, **small)


def mark(model: nn.Module) -> Tensor:
    """Each patch's position gets row · 1000 + column; those are returned, (rows, columns)."""
    rows, columns = model.patch_embed.grid_size
    grid = torch.arange(rows).view(-1, 1) * 1000.0 + torch.arange(columns)
    with torch.no_grad():
        prefix = model.pos_embed.shape[1] - rows * columns
        model.pos_embed[:, :prefix] = -torch.arange(1.0, prefix + 1).view(1, -1, 1)
        model.pos_embed[0, prefix:] = grid.reshape(-1, 1)
    return grid


def grid_of(model: nn.Module, pos_embed: Tensor) -> Tensor:
    rows, columns = model.patch_embed.grid_size
    assert pos_embed.shape == model.pos_embed.shape
    return pos_embed[0, pos_embed.shape[1] - rows * columns :, 0].view(rows, columns)


@pytest.mark.parametrize("new", [(4, 4), (6, 6), (5, 7)])
def test_no_pair_of_models_is_scrambled(new):
    sources = [build(name, (4, 4)) for name in KINDS]
    targets = [build(name, new) for name in KINDS]
    for source, model in itertools.product(sources, targets):
        grid = mark(source)
        mark(model)
        fitted = fit_positions(model, source.state_dict()).tensors
        found = grid_of(model, fitted.get("pos_embed", source.pos_embed))
        if new == (4, 4):
            assert torch.equal(found, grid)
        else:
            expected = cubic_matrix(4, new[0]) @ grid @ cubic_matrix(4, new[1]).T
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("old, new", [((4, 8), (6, 12)), ((6, 3), (4, 2)), ((2, 6), (2, 6))])
@pytest.mark.parametrize("source", ["deit_small_patch16_224", "deit3_small_patch16_224"])
@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_256", "deit_small_distilled_patch16_224"])
def test_grid_of_the_models_shape_need_not_be_square(source, name, old, new):
    source, model = build(source, old), build(name, new)
    grid = mark(source)
    fitted = fit_positions(model, source.state_dict()).tensors
    found = grid_of(model, fitted.get("pos_embed", source.pos_embed))
    expected = cubic_matrix(old[0], new[0]) @ grid @ cubic_matrix(old[1], new[1]).T
    torch.testing.assert_close(found, grid if old == new else expected)


def test_own_weights_stay_as_they_are():
    for name in KINDS:
        for grid in ((4, 4), (2, 8)):
            model = build(name, grid)
            assert not fit_positions(model, model.state_dict()).tensors


# --- tokens ---------------------------------------------------------------------------------------


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [TimmViT, VisionTransformer])
@pytest.mark.parametrize("there, here", [(False, True), (True, False)])
def test_class_token_with_and_without_a_position_computes_the_same(kind, there, here):
    source = kind(**SMALL, no_embed_class=there).eval()
    model = kind(**SMALL, no_embed_class=here).eval()
    with torch.no_grad():
        source.cls_token.normal_()
        source.pos_embed.normal_()
    report = load_pretrained_weights(model, source.state_dict())
    torch.testing.assert_close(model(images()), source(images()))
    assert report.fitted["pos_embed"] == f"{1 - there} tokens with a position to {1 - here}"
    assert ("cls_token" in report.fitted) is here


@pytest.mark.parametrize("here", [False, True])
def test_register_tokens_of_the_model_alone_keep_their_positions(here):
    source = TimmViT(**SMALL)
    model = TimmViT(**SMALL, reg_tokens=4, no_embed_class=here)
    own = model.pos_embed.clone()
    grid = mark(source)
    load_pretrained_weights(model, source.state_dict())
    assert torch.equal(grid_of(model, model.pos_embed), grid)
    if not here:
        assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
        assert torch.equal(model.pos_embed[:, 1:5], own[:, 1:5])


def test_dinov2s_names_with_registers():
    """Its class token has a position, timm's model of it has none."""
    model = build("vit_small_patch14_reg4_dinov2", (4, 4))
    weights = {n.replace("reg_token", "register_tokens"): x for n, x in model.state_dict().items()}
    weights |= {"mask_token": torch.zeros(1, 48), "cls_token": torch.zeros(1, 1, 48)}
    grid = torch.arange(16.0).view(1, -1, 1).expand(1, -1, 48)
    weights["pos_embed"] = torch.cat((torch.full((1, 1, 48), -7.0), grid), dim=1)
    load_pretrained_weights(model, weights)
    assert torch.equal(model.pos_embed, grid)
    assert torch.equal(model.cls_token, torch.full((1, 1, 48), -7.0))


# --- what can't be worked out ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, positions, message",
    [
        # 4 × 4 without the class token, or 3 × 5 with it.
        ((6, 10), 16, "can be 0 for tokens and 4×4 patches or 1 for tokens and 3×5 patches"),
        ((4, 4), 1 + 7 * 10, "are no square of patches, nor of the shape 4×4"),
    ],
)
def test_unclear_positions_are_an_error(grid, positions, message):
    model = build("deit_small_distilled_patch16_224", grid)
    weights = model.state_dict() | {"pos_embed": torch.zeros(1, positions, 48)}
    del weights["dist_token"]
    with pytest.raises(CheckpointError, match=message):
        fit_positions(model, weights)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_weights(model, weights)
    own = model.pos_embed.clone()
    report = load_pretrained_weights(model, weights, allow_partial=True)
    assert "pos_embed" in report.missing and torch.equal(model.pos_embed, own)


# --- other forms of embeddings --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pit_ti_224", "volo_d1_224"])
def test_embeddings_whose_shape_tells_the_grid(name):
    source, model = timm.create_model(name), timm.create_model(name, img_size=288)
    spatial = (2, 3) if "pit" in name else (1, 2)
    with torch.no_grad():
        source.pos_embed.copy_(torch.randn_like(source.pos_embed))
    fitted = fit_positions(model, source.state_dict()).tensors["pos_embed"]
    back = (0, 1, 2, 3) if "pit" in name else (0, 3, 1, 2)
    size = [model.pos_embed.shape[i] for i in spatial]
    expected = F.interpolate(source.pos_embed.permute(back), size, mode="bicubic")
    torch.testing.assert_close(fitted.permute(back), expected)
    assert fitted.shape == model.pos_embed.shape


# --- interpolation --------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [(64, 64), (16, 16), (32, 64), (48, 16)])
@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "deit_tiny_distilled", "cait_XXS24_224"])
def test_position_embeddings_are_resized(name, new):
    patch = 4 if "patch4" in name else 16
    name = resolve_name(name)
    source = timm.create_model(name, img_size=4 * patch, depth=1)
    new = (new[0] * patch // 16, new[1] * patch // 16)
    model = timm.create_model(name, img_size=new, depth=1)
    prefix = source.pos_embed.shape[1] - 16
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
    assert report.fitted == expected


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
    assert report.fitted == {"pos_embed": "2×6 to 4×12"}
    grid = model.pos_embed[0, 1:, 0].view(4, 12)
    torch.testing.assert_close(grid, grid[:1].expand(4, -1))
    assert grid[0, 0] < grid[0, -1]
