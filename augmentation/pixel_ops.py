"""What Pillow does to an image, done to a batch: uint8 (n, C, H, W) in and out, on any device.

Rotation, perspective and ``gaussian`` also take images of 16 bits, as float32, and keep fractions.

Each function takes one argument per image, (n,) float32, ``perspective`` eight of them. Results are
Pillow's to one level of 255, except for rotation and perspective, whose cubic kernel differs a
little, the hue, of which a few pixels in a thousand are off by one of 255 steps, and ``blur``,
which is Gaussian here and three box filters there.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from augmentation import host
from augmentation.sampling import limited, middles, sampled
from augmentation.warp import perspective

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # ITU-R 601-2, as Pillow's mode L
BLUR_REACH = 6  # pixels: three std of the widest blur, 2 pixels


def _each(values: Tensor) -> Tensor:
    """(n,) to (n, 1, 1, 1)."""
    return values[:, None, None, None]


def on_host(x: Tensor) -> bool:
    """Whether NumPy does what torch is slow at (``host``), which is of bytes."""
    return x.device.type == "cpu" and x.dtype != torch.float32


def _to_bytes(x: Tensor) -> Tensor:
    """Floats from 0 to 255, cut off."""
    return host.to_bytes(x) if x.device.type == "cpu" else x.to(torch.uint8)


def _to_levels(x: Tensor) -> Tensor:
    """Floats as Pillow stores them: limited, then cut off."""
    return _to_bytes(x.clamp_(0, 255))


def _blend(other: Tensor | float, x: Tensor, factor: Tensor) -> Tensor:
    """``other + factor × (x − other)``; a factor above 1 moves away from ``other``."""
    return _to_levels((x - other).mul_(_each(factor)).add_(other))


def _luma(x: Tensor) -> Tensor:
    """(n, 3, H, W) to (n, 1, H, W) float32, whole numbers; greys are their own."""
    if x.shape[1] == 1:
        return x.float()
    red, green, blue = x.split(1, dim=1)
    return (red * RED).add_(green, alpha=GREEN).add_(blue, alpha=BLUE).add_(0.5).floor_()


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the ``bits`` highest bits of a level."""
    mask = 256 - torch.exp2(8 - bits.clamp(max=8))
    return x & _each(mask.to(torch.uint8))


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels from ``threshold`` (0 to 256) on."""
    limit = _each(threshold.to(torch.int16))
    return host.inverted_from(x, limit) if on_host(x) else torch.where(x < limit, x, 255 - x)


def solarize_add(x: Tensor, add: Tensor) -> Tensor:
    """Add ``add`` (at most 128) to the levels below 128."""
    # Without a comparison: the highest bit of a level says whether it is below 128.
    return x + _each(add.to(torch.uint8)) * (1 - (x >> 7))


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _to_levels(x.float().mul_(_each(factor)))


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(x), x.float(), factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_()
    return _blend(mean.float(), x.float(), factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed image; the border stays as it is."""
    values = x.to(torch.int16)
    rows = (values[..., :-2, :] + values[..., 1:-1, :]).add_(values[..., 2:, :])
    around = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    inner = values[..., 1:-1, 1:-1]
    # Pillow's SMOOTH filter: a 3×3 of ones with a 5 in the middle, over 13.
    smooth = around.add_(inner, alpha=4).float().div_(13).add_(0.5).floor_()
    result = x.clone()
    result[..., 1:-1, 1:-1] = _blend(smooth, inner, factor)
    return result


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch the levels of each channel to the whole range; a flat one stays as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)  # (n, 3, 1, 1)
    flat = high == low
    scale = 255 / (high - low).masked_fill_(flat, 255)
    # The small number makes up for products that fall just below a whole number.
    return _to_levels(x.float().sub_(low.masked_fill(flat, 0)).mul_(scale).add_(1e-3))


def _histograms(levels: Tensor) -> Tensor:
    """Levels, (n, 3, P) uint8, to (n, 3, 256) counts; the device isn't waited for."""
    if on_host(levels):
        return host.histograms(levels)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(2, levels.long(), torch.ones_like(levels, dtype=torch.int64))


def _look_up(table: Tensor, levels: Tensor) -> Tensor:
    """The value in ``table``, (n, 3, 256) uint8, of each level, (n, 3, P) uint8."""
    return host.look_up(table, levels) if on_host(levels) else table.gather(2, levels.long())


def equalize(x: Tensor, _: Tensor) -> Tensor:
    """Make the histogram of each channel as flat as whole levels allow."""
    height, width = x.shape[2:]
    levels = x.flatten(2)  # (n, 3, H·W)
    counts = _histograms(levels)
    # The last level that occurs doesn't count for the step.
    last = (counts > 0).long().mul_(torch.arange(256, device=x.device)).amax(2, keepdim=True)
    step = (height * width - counts.gather(2, last)) // 255  # (n, 3, 1)
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device)).to(torch.uint8)
    return _look_up(table, levels).view_as(x)  # (n, 3, H·W) to (n, 3, H, W)


def grey(x: Tensor, _: Tensor) -> Tensor:
    return _to_bytes(_luma(x)).expand_as(x)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, from -0.5 to 0.5, as Pillow's mode HSV has it."""
    red, green, blue = x.float().split(1, dim=1)  # (n, 1, H, W)
    value = torch.maximum(torch.maximum(red, green), blue)
    span = value - torch.minimum(torch.minimum(red, green), blue)
    # How far each channel is from the greatest, as a share.
    from_red, from_green, from_blue = ((value - c) / span.clamp(min=1) for c in (red, green, blue))
    sixths = torch.where(
        red == value,
        from_blue - from_green,
        torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red),
    )
    # 255 steps, of which 256 are a turn where they are added up.
    steps = (sixths / 6 % 1 * 255).floor_()
    steps = (steps + _each((turn * 255).trunc())) % 256
    share = (span / value.clamp(min=1) * 255).floor_() / 255
    place = steps * (6 / 255)
    channels = []
    for start in (5, 3, 1):
        k = (start + place) % 6
        lack = torch.minimum(k, 4 - k).clamp_(0, 1)
        channels.append((value * (1 - share * lack)).add_(0.5).floor_())
    return torch.where(span > 0, _to_bytes(torch.cat(channels, 1)), x)


def gaussian(x: Tensor, std: Tensor) -> Tensor:
    """Gaussian blur of ``std`` pixels (at most 2), the image mirrored around it (torchvision's)."""
    return blur(x, std, "reflect")


def blur(x: Tensor, std: Tensor, around: str = "replicate") -> Tensor:
    """Gaussian blur of ``std`` pixels (at most 2); ``around`` the image, as ``F.pad`` has it."""
    n, channels, height, width = x.shape
    # What is mirrored must be less than the image.
    reach = min(BLUR_REACH, height - 1, width - 1) if around == "reflect" else BLUR_REACH
    at = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (at / std[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (3n, 13)
    # Every channel of every image is a group of its own: (1, 3n, H, W).
    values = x.float().view(1, n * channels, height, width)
    along_rows, along_columns = kernel[:, None, None, :], kernel[:, None, :, None]
    for weight, margin in (
        (along_rows, (reach, reach, 0, 0)),
        (along_columns, (0, 0, reach, reach)),
    ):
        values = F.conv2d(F.pad(values, margin, mode=around), weight, groups=n * channels)
    values = values.view_as(x)
    return _to_levels(values.add_(0.5)) if x.dtype == torch.uint8 else limited(values, x.dtype)


# --- geometry -----------------------------------------------------------------------------------
# ``cubic`` asks for the cubic kernel, otherwise it is the linear one; what comes from
# outside is ``fill``, (3,) uint8.

Geometry = Callable[[Tensor, Tensor, bool, Tensor], Tensor]


def _shift_rows(x: Tensor, shift: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """Each row from ``shift`` (n, H) pixels further right."""
    if on_host(x):
        return host.shift_rows(x, shift, cubic, fill)
    n, channels, height, width = x.shape
    whole = shift.floor()
    weights = host.taps(shift - whole, cubic)
    first, last = min(weights), max(weights)
    window = torch.arange(first, width + last, device=x.device)
    index = (whole.long()[..., None] + window).clamp_(0, width - 1)[:, None]  # (n, 1, H, W + …)
    source = x.gather(3, index.expand(n, channels, height, len(window))).float()
    values = None
    for tap, weight in weights.items():
        part, weight = source[..., tap - first :][..., :width], weight[:, None, :, None]
        values = part * weight if values is None else values.addcmul_(part, weight)
    place = torch.arange(width, device=x.device) + 0.5 + shift[..., None]  # (n, H, W)
    inside = ((place >= 0) & (place < width))[:, None]
    # Cut off like Pillow's, which doesn't see the 1e-3 that single precision may be off by.
    return torch.where(inside, _to_levels(values.add_(1e-3)), fill[:, None, None])


def _shift_columns(x: Tensor, shift: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    if on_host(x):
        return host.shift_columns(x, shift, cubic, fill)
    moved = _shift_rows(x.transpose(2, 3), shift, cubic, fill)
    return moved.transpose(2, 3).contiguous()


def shear_x(x: Tensor, factor: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    return _shift_rows(x, factor[:, None] * middles(x.shape[2], x), cubic, fill)


def shear_y(x: Tensor, factor: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    return _shift_columns(x, factor[:, None] * middles(x.shape[3], x), cubic, fill)


def translate_x(x: Tensor, pixels: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    return _shift_rows(x, pixels[:, None].expand(-1, x.shape[2]), cubic, fill)


def translate_y(x: Tensor, pixels: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    return _shift_columns(x, pixels[:, None].expand(-1, x.shape[3]), cubic, fill)


def rotate(x: Tensor, degrees: Tensor, cubic: bool, fill: Tensor) -> Tensor:
    """Counter-clockwise around the middle."""
    if on_host(x):
        return host.rotate(x, degrees, cubic, fill)
    _, _, height, width = x.shape
    angle = degrees * (-math.pi / 180)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    down = (middles(height, x) - height / 2)[:, None]
    right = middles(width, x) - width / 2
    columns = cos * right + sin * down  # (n, H, W), pixels from the middle
    rows = cos * down - sin * right
    return sampled(x, columns, rows, cubic, fill)


LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "saturation": saturation,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "grey": grey,
    "blur": blur,
    "gaussian": gaussian,
    "hue": hue,
}
GEOMETRY: dict[str, Geometry] = {
    "rotate": rotate,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "perspective": perspective,
}
