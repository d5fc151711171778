"""Random erasing (arXiv:1708.04896) by the batch: the boxes that are drawn, and what fills them."""

import numpy as np
import torch
from torch import Tensor

from augmentation.draws import Draws, between

ATTEMPTS = 10  # tries at a box that fits, as in timm
NOISE = 1 << 20  # places in the table of noise where a box may begin
AREA = (0.02, 1 / 3)  # share of the image
ASPECT = (0.3, 1 / 0.3)  # width over height


def draws_per_image(most: int) -> int:
    """Numbers that ``random_boxes`` takes of each image, for at most ``most`` boxes."""
    return 2 + most * (2 * ATTEMPTS + 3)


def random_boxes(
    draws: Draws, probability: float, most: int, size: tuple[int, int], spared: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes to erase, (B, most, 4) int64 as y0, y1, x0, x1, and where their noise begins.

    Args:
        draws: of the batch, ``draws_per_image(most)`` each.
        probability: that an image is erased at all.
        most: greatest number of boxes per image.
        size: height and width of the images, in pixels.
        spared: (B,) bool, images that stay whole.

    Returns:
        The boxes, of no height where nothing is erased, and places in the table of noise, (B, most)
        int64.
    """
    erased = (draws.uniform() < probability) & ~spared
    count = 1 + (draws.uniform() * most).astype(np.int64)
    # (B, K, ATTEMPTS), of which the first that fits is taken.
    area = size[0] * size[1] * between(draws.uniform(most, ATTEMPTS), *AREA) / count[:, None, None]
    aspect = np.exp(between(draws.uniform(most, ATTEMPTS), *np.log(ASPECT)))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size[0]) & (widths < size[1])
    first = fits.argmax(2)[..., None]
    height = np.take_along_axis(heights, first, 2)[..., 0].astype(np.int64)  # (B, K)
    width = np.take_along_axis(widths, first, 2)[..., 0].astype(np.int64)
    top, left = draws.below(size[0] - height + 1), draws.below(size[1] - width + 1)
    wanted = erased[:, None] & fits.any(2) & (np.arange(most) < count[:, None])
    boxes = np.zeros((len(erased), most, 4), dtype=np.int64)
    boxes[wanted] = np.stack([top, top + height, left, left + width], -1)[wanted]
    return boxes, (draws.uniform(most) * NOISE).astype(np.int64)


def noise_table(size: tuple[int, int], generator: torch.Generator, channels: int = 3) -> Tensor:
    """Standard normal noise, from every place of which an image of ``size`` can be filled."""
    return torch.randn(NOISE + channels * size[0] * size[1], generator=generator)


def erase(
    values: Tensor, boxes: np.ndarray, starts: np.ndarray, mode: str, noise: Tensor | None
) -> Tensor:
    """Fill the boxes of normalised images, (B, C, H, W) float32, in place.

    Args:
        values: the images.
        boxes: (B, K, 4), as of ``random_boxes``.
        starts: (B, K), where in ``noise`` that of a box begins.
        mode: "const" fills in zeros, "rand" one colour of noise, "pixel" noise for every pixel.
        noise: the table of noise on the images' device; not needed for "const".
    """
    fill = _fill_on_host if values.device.type == "cpu" else _fill_on_device
    for k in range(boxes.shape[1]):
        which = np.flatnonzero(boxes[:, k, 1] > boxes[:, k, 0])
        if len(which):
            fill(values, which, boxes[which, k], starts[which, k], mode, noise)
    return values


def _fill_on_host(
    values: Tensor,
    which: np.ndarray,
    boxes: np.ndarray,
    starts: np.ndarray,
    mode: str,
    noise: Tensor | None,
) -> None:
    shape, pixels = values.shape[1:], values.numpy()
    table = None if mode == "const" else noise.numpy()
    places = zip(which.tolist(), boxes.tolist(), starts.tolist(), strict=True)
    for i, (y0, y1, x0, x1), start in places:
        box = pixels[i, :, y0:y1, x0:x1]
        if table is None:
            box[:] = 0
        elif mode == "rand":
            box[:] = table[start : start + len(box), None, None]
        else:
            own = table[start : start + shape.numel()].reshape(shape)
            box[:] = own[:, y0:y1, x0:x1]


def _fill_on_device(
    values: Tensor,
    which: np.ndarray,
    boxes: np.ndarray,
    starts: np.ndarray,
    mode: str,
    noise: Tensor | None,
) -> None:
    device, shape = values.device, values.shape[1:]
    down, right = (torch.arange(side, device=device) for side in shape[1:])
    index, edges = (torch.from_numpy(x).to(device, non_blocking=True) for x in (which, boxes))
    y0, y1, x0, x1 = edges[..., None].unbind(1)  # (n, 1)
    rows, columns = (down >= y0) & (down < y1), (right >= x0) & (right < x1)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (n, 1, H, W)
    if mode == "const":
        filling = torch.zeros((), device=device)
    else:
        length = shape[0] if mode == "rand" else shape.numel()
        begin = torch.from_numpy(starts).to(device, non_blocking=True)
        own = noise.unfold(0, length, 1)[begin]  # (n, length)
        # (n, C, 1, 1) or (n, C, H, W)
        filling = own.view(-1, shape[0], 1, 1) if mode == "rand" else own.view(-1, *shape)
    values[index] = torch.where(inside, filling, values[index])
