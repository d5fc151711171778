"""Tables of other models than ViT whose shape follows from the size of the image.

Biases for relative positions, and position embeddings that don't lie in ``pos_embed`` behind a
``patch_embed``. They are interpolated as timm does for published weights: the same functions where
timm has one for the model's family.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    resample_abs_pos_embed,
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_levit,
)
from timm.models import efficientformer_v2, levit
from timm.models.nest import resize_pos_embed
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from architectures.position_embeddings import Size, interpolate_grid
from architectures.sizes import ImageSize, height_width, size_text

# Layers of a fixed number of patches, and what they learnt is about each pair of those.
_MIXING = re.compile(
    r"\.(mlp_tokens\.\w+|linear_tokens|mlp_channels\.gate\.proj|attn)\.(weight|bias)$"
)


# Attention between all places of the image. In EfficientViT (MSRA) and TinyViT it is in square
# windows, which timm's functions for their weights fit.
_OVER_THE_IMAGE = (
    *(levit.Attention, levit.AttentionDownsample),
    *(efficientformer_v2.Attention2d, efficientformer_v2.Attention2dDownsample),
)


class _UnknownGridError(ValueError):
    """The sides of a table can't be worked out from its number of entries."""


def fit_tables(
    model: nn.Module, weights: Mapping[str, Tensor], size: ImageSize | None = None
) -> dict[str, Tensor]:
    """Those of ``weights``, by the names of ``model``, that have to change, with its shapes.

    Where the number of entries doesn't tell the sides, they are nearest to the shape of images of
    ``size`` pixels, which the weights were trained for; else they are equal. What can't be fitted
    is left out.
    """
    own = model.state_dict()
    found = {}
    for name, value in weights.items():
        fit = _kind(name)
        if fit is None or name not in own or value.ndim != own[name].ndim or value.is_meta:
            continue
        owner, _, _ = name.rpartition(".")
        try:
            new = fit(model.get_submodule(owner), name, value, own[name], size)
        except _UnknownGridError:
            continue
        if new is not value and new.shape == own[name].shape:
            found[name] = new
    return found


def depends_on_size(names: Iterable[str]) -> bool:
    """Whether tensors of one of ``names`` follow from the size of the image."""
    return any(_kind(n) or _MIXING.search(n) or n.endswith("pos_embed") for n in names)


def trained_size(
    model: nn.Module, weights: Mapping[str, Tensor], size: ImageSize | None
) -> ImageSize | None:
    """Pixels that ``weights`` were trained for: ``size`` where it is known, or what a layer over a
    square of patches tells; None where nothing does."""
    embed = getattr(model, "patch_embed", getattr(model, "stem", None))
    patch = getattr(embed, "patch_size", None)
    if size is not None or patch is None:
        return size
    side = patch if isinstance(patch, int) else patch[0]
    for name, value in weights.items():
        if not (_MIXING.search(name) and name.endswith("weight") and value.ndim >= 2):
            continue
        for count in (value.shape[1], value.shape[0]):
            if math.isqrt(count) ** 2 == count:
                return math.isqrt(count) * side
    return None


def size_hint(model: nn.Module, weights: Mapping[str, Tensor], size: ImageSize | None) -> str:
    """What helps where ``weights`` don't fit ``model`` for their size."""
    known = trained_size(model, weights, size)
    if known is None:
        return "they depend on the size of the images: --input-size of the one they were trained at"
    words = " ".join(map(str, dict.fromkeys(height_width(known))))
    return f"the weights are for images of {size_text(known)} pixels: --input-size {words}"


# --- the sides of a table -------------------------------------------------------------------------


def _sides(count: int, size: ImageSize | None) -> Size:
    """Rows and columns of ``count`` entries that cover an image of ``size``."""
    side = math.isqrt(count)
    height, width = (1, 1) if size is None else height_width(size)
    if height == width:
        if side * side != count:
            raise _UnknownGridError
        return side, side
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda p: abs(math.log(p[0] * width / (p[1] * height))))


def _window(module: nn.Module, count: int, ours: Size, size: ImageSize | None) -> Size:
    """The window whose ``count`` differences of two places a table lists.

    Swin's are squares for most images of any shape, the others have the shape of the image.
    """
    same, side = count == _differences(ours), math.isqrt(count)
    squares = isinstance(module, WindowAttention)
    if same and (squares or ours[0] == ours[1]):
        return ours
    square_images = size is None or len(set(height_width(size))) == 1
    if (square_images or squares) and side * side == count:
        rows, columns = side, side
    elif square_images and same:
        return ours
    else:
        rows, columns = _sides(count, size)
    if rows % 2 == 0 or columns % 2 == 0:
        raise _UnknownGridError
    return (rows + 1) // 2, (columns + 1) // 2


def _differences(window: Size) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


# --- how each kind is fitted ----------------------------------------------------------------------


def _bias_table(
    module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None
) -> Tensor:
    """Swin, BEiT, MaxViT, GC ViT: (differences + tokens, heads), or (heads, rows, columns)."""
    window = tuple(getattr(module, "window_size", None) or (module.size, module.size))
    if value.ndim == 3:
        new = partial(resize_rel_pos_bias_table, value, window, own.shape)
        return _unless_equal(value, own, new)
    tokens = own.shape[0] - _differences(window)
    before = _window(module, value.shape[0] - tokens, window, size)
    if before == window:
        return value
    return resize_rel_pos_bias_table(value, window, own.shape, old_window_size=before)


def _attention_biases(
    module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None
) -> Tensor:
    """LeViT, EfficientFormer V2: (heads, rows · columns), of distances."""
    if not isinstance(module, _OVER_THE_IMAGE):
        return value
    old, new = _sides(value.shape[1], size), tuple(module.resolution)
    if old == new:
        return value
    if old[0] == old[1] and new[0] == new[1]:
        return resize_rel_pos_bias_table_levit(value.T, own.shape[::-1]).T.contiguous()
    grid = value.float().view(1, len(value), *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid.view(own.shape).to(value.dtype)


def _line(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """SAM, MViT V2, BoTNet: (2 · side - 1, width), for rows or for columns."""

    def fitted() -> Tensor:
        return F.interpolate(value.T[None], size=len(own), mode="linear")[0].T.contiguous()

    return _unless_equal(value, own, fitted)


def _lambda(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """Lambda layers: (2 · rows - 1, 2 · columns - 1, width)."""

    def fitted() -> Tensor:
        maps = value.permute(2, 0, 1)
        window = ((own.shape[0] + 1) // 2, (own.shape[1] + 1) // 2)
        new = resize_rel_pos_bias_table(maps, window, (len(maps), *own.shape[:2]))
        return new.permute(1, 2, 0).contiguous()

    return _unless_equal(value, own, fitted)


def _pool(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """CLIP's ResNets: (1 + rows · columns, width)."""
    old, new = _sides(len(value) - 1, size), tuple(module.feat_size)
    if old == new:
        return value
    return resample_abs_pos_embed(value[None], new, old_size=old, num_prefix_tokens=1)[0]


def _hiera(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """Hiera: (1, rows · columns, width), without tokens; others' are fitted elsewhere."""
    grid = getattr(module, "tokens_spatial_shape", None)
    if grid is None or value.ndim != 3:
        return value
    return interpolate_grid(value, _sides(value.shape[1], size), tuple(grid))


def _tnt(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    old, new = _sides(value.shape[1] - 1, size), tuple(module.pixel_embed.grid_size)
    if old == new:
        return value
    return resample_abs_pos_embed(value, new, old_size=old, num_prefix_tokens=1)


def _library(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """ViTs of transformers and of torchvision, whose images are squares: (1, tokens + rows ·
    columns, width)."""
    embed = getattr(module, "patch_embeddings", None)
    if embed is None:
        new = _sides(own.shape[1] - 1, None)
    else:
        pixels, patch = (getattr(embed, k) for k in ("image_size", "patch_size"))
        new = tuple(i // p for i, p in zip(_pair(pixels), _pair(patch), strict=True))
    tokens = own.shape[1] - new[0] * new[1]
    old = _sides(value.shape[1] - tokens, size)
    if old == new:
        return value
    return torch.cat((value[:, :tokens], interpolate_grid(value[:, tokens:], old, new)), dim=1)


def _pair(x: int | Size) -> Size:
    return (x, x) if isinstance(x, int) else (x[0], x[1])


def _branch(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """CrossViT: (1, 1 + rows · columns, width) for each branch. Visformer: a map for each stage."""
    if value.ndim == 4:
        return _unless_equal(
            value, own, lambda: F.interpolate(value.float(), size=own.shape[2:], mode="bicubic")
        )
    embed = module.patch_embed[int(name.rpartition("_")[2])]
    new = tuple(s // p for s, p in zip(embed.img_size, embed.patch_size, strict=True))
    old = _sides(value.shape[1] - 1, size)
    if old == new:
        return value
    return torch.cat((value[:, :1], interpolate_grid(value[:, 1:], old, new)), dim=1)


def _nest(module: Any, name: str, value: Tensor, own: Tensor, size: ImageSize | None) -> Tensor:
    """NesT: (1, blocks, patches of a block, width), both squares."""
    return _unless_equal(value, own, lambda: resize_pos_embed(value, own))


def _unless_equal(value: Tensor, own: Tensor, fitted: Callable[[], Tensor]) -> Tensor:
    return value if value.shape == own.shape else fitted()


_Fit = Callable[[Any, str, Tensor, Tensor, ImageSize | None], Tensor]
# By the ends of names.
_KINDS: tuple[tuple[re.Pattern[str], _Fit], ...] = tuple(
    (re.compile(rf"(?:^|\.)(?:{names})$"), fit)
    for names, fit in {
        "relative_position_bias_table": _bias_table,
        "attention_biases": _attention_biases,
        "rel_pos_[hw]|(?:height|width)_rel": _line,
        "pos_emb": _lambda,
        r"head\.pos_embed": _pool,
        r"levels\.\d+\.pos_embed": _nest,
        r"patch_pos": _tnt,
        r"pos_embed_?\d": _branch,
        "position_embeddings|pos_embedding": _library,
    }.items()
) + ((re.compile("^pos_embed$"), _hiera),)


def _kind(name: str) -> _Fit | None:
    return next((fit for pattern, fit in _KINDS if pattern.search(name)), None)
