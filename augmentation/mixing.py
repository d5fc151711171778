"""Mixup and cutmix: drawn on the host, applied on the device."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from config import AugmentOptions


def one_hot(targets: Tensor, num_classes: int) -> Tensor:
    """(B,) int64 to (B, num_classes) float32; torch's own looks at the values, and so waits."""
    zeros = torch.zeros(len(targets), num_classes, device=targets.device)
    return zeros.scatter_(1, targets[:, None], 1.0)


class Mix(NamedTuple):
    """How images mix with their partners; n is B, or 1 where one draw serves the whole batch."""

    lam: np.ndarray
    """(n,) float64: share of an image that is its own."""
    cut: np.ndarray
    """(n,) bool: a box comes from the partner, rather than a share of every pixel."""
    boxes: np.ndarray
    """(n, 4) int64: y0, y1, x0, x1 of the box; empty where nothing is cut."""

    def mirrored(self, odd: int) -> "Mix":
        """The same for both halves of a batch; one in the middle (``odd`` = 1) has no partner."""
        return Mix(
            np.concatenate([self.lam, np.ones(odd), self.lam[::-1]]),
            np.concatenate([self.cut, np.zeros(odd, dtype=bool), self.cut[::-1]]),
            np.concatenate([self.boxes, np.zeros((odd, 4), dtype=np.int64), self.boxes[::-1]]),
        )


class Mixer:
    """Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899), each image with the one at the
    mirrored place of the batch.

    The semantics and, for a given seed, the draws are those of timm's ``Mixup``.

    Args:
        num_classes: length of the soft targets.
        mixup, cutmix: alpha of the beta distribution, 0 turns it off.
        cutmix_minmax: least and greatest side of the box, as a share of the image; replaces alpha.
        prob: chance of mixing at all.
        switch_prob: chance of cutmix where both are on.
        mode: "batch" draws once for all, "pair" once for image i and its partner B-1-i, "elem" for
            each image.
        off_epoch: nothing is mixed once that many epochs are done; 0: to the end.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float,
        cutmix: float,
        cutmix_minmax: tuple[float, ...] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        off_epoch: int = 0,
    ) -> None:
        self.num_classes = num_classes
        self.mixup = mixup
        self.cutmix = cutmix if cutmix_minmax is None else 1.0
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.off_epoch = off_epoch

    def in_epoch(self, epoch: int) -> "Mixer | None":
        """Itself, or None where that epoch, counted from 0, isn't mixed."""
        return None if 0 < self.off_epoch <= epoch else self

    def __call__(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a batch; a pure function of its arguments. Odd batch sizes work.

        images: (B, C, H, W), any device; targets: (B,) int64, or several labels (B, num_classes).
        Returns new images and soft targets (B, num_classes) float32.
        """
        batch, _, height, width = images.shape
        mix = self.draw(batch, height, width, seed)
        hard = one_hot(targets, self.num_classes) if targets.ndim == 1 else targets.float()
        return mix_images(images, mix), mix_targets(hard, mix)

    # --- drawing, on the host ---------------------------------------------------------------------

    def draw(self, batch: int, height: int, width: int, seed: int) -> Mix:
        """How a batch of images of this size mixes."""
        rng = np.random.RandomState(seed % 2**32)
        if self.mode == "batch":
            lam, cut = self._draw_once(rng)
        else:
            lam, cut = self._draw_each(rng, batch if self.mode == "elem" else batch // 2)
        boxes = np.zeros((len(lam), 4), dtype=np.int64)
        for i in np.flatnonzero(cut & (lam != 1)):
            boxes[i] = y0, y1, x0, x1 = self._draw_box(rng, float(lam[i]), height, width)
            lam[i] = 1 - (y1 - y0) * (x1 - x0) / (height * width)
        mix = Mix(lam, cut, boxes)
        return mix.mirrored(batch % 2) if self.mode == "pair" else mix

    def _draw_once(self, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        if rng.rand() >= self.prob:
            return np.ones(1), np.zeros(1, dtype=bool)
        both = self.mixup > 0 and self.cutmix > 0
        cut = rng.rand() < self.switch_prob if both else self.cutmix > 0
        alpha = self.cutmix if cut else self.mixup
        return np.array([rng.beta(alpha, alpha)]), np.array([cut])

    def _draw_each(self, rng: np.random.RandomState, n: int) -> tuple[np.ndarray, np.ndarray]:
        both = self.mixup > 0 and self.cutmix > 0
        cut = rng.rand(n) < self.switch_prob if both else np.full(n, self.cutmix > 0)
        draws = [rng.beta(a, a, size=n) for a in (self.cutmix, self.mixup) if a > 0]
        lam = np.where(cut, draws[0], draws[-1])
        return np.where(rng.rand(n) < self.prob, lam, 1.0), cut

    def _draw_box(
        self, rng: np.random.RandomState, lam: float, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Rows y0 to y1 and columns x0 to x1 that come from the partner."""
        if self.cutmix_minmax is not None:
            least, most = self.cutmix_minmax
            low_h, low_w = int(height * least), int(width * least)
            cut_h = rng.randint(low_h, max(low_h + 1, int(height * most)))
            cut_w = rng.randint(low_w, max(low_w + 1, int(width * most)))
            y0 = rng.randint(0, height - cut_h + 1)
            x0 = rng.randint(0, width - cut_w + 1)
            return y0, y0 + cut_h, x0, x0 + cut_w
        side = np.sqrt(1 - lam)
        cut_h, cut_w = int(height * side), int(width * side)
        y, x = rng.randint(0, height), rng.randint(0, width)
        return (
            max(0, y - cut_h // 2),
            min(height, y + (cut_h + 1) // 2),
            max(0, x - cut_w // 2),
            min(width, x + (cut_w + 1) // 2),
        )


# --- applying, on any device ----------------------------------------------------------------------


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Images (B, C, H, W) with their partners, as new ones; the device isn't waited for."""
    device = images.device
    height, width = images.shape[-2:]
    boxes = torch.from_numpy(mix.boxes).to(device, non_blocking=True)
    y0, y1, x0, x1 = boxes[..., None].unbind(1)  # each (n, 1)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = (rows >= y0) & (rows < y1)  # (n, H)
    in_columns = (columns >= x0) & (columns < x1)  # (n, W)
    boxed = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (n, 1, H, W)
    blend = torch.from_numpy(np.where(mix.cut, 1.0, mix.lam)).to(images.dtype)
    blend = blend.to(device, non_blocking=True)
    weight = blend[:, None, None, None].expand(boxed.shape).masked_fill(boxed, 0.0)
    return torch.lerp(images.flip(0), images, weight)


def mix_targets(hard: Tensor, mix: Mix) -> Tensor:
    """Targets of 0 or 1 (B, num_classes) with those of the partners, by their share of pixels."""
    weight = torch.from_numpy(mix.lam).float().to(hard.device, non_blocking=True)[:, None]
    return torch.lerp(hard.flip(0), hard, weight)


def build_mixer(options: "AugmentOptions", num_classes: int) -> Mixer | None:
    """The mixer of a recipe, or None if it mixes nothing."""
    on = options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None
    if not on or options.mixup_prob == 0:
        return None
    return Mixer(
        num_classes,
        mixup=options.mixup,
        cutmix=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        off_epoch=options.mixup_off_epoch,
    )
