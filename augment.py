"""The recipes' augmentation: of one picture (transforms) and of a batch (mixup and cutmix)."""

import logging
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from errors import OptionError

if TYPE_CHECKING:
    from config import AugmentOptions

logger = logging.getLogger(__name__)

SMALL = 32  # inputs up to this many pixels are cropped as CIFAR pictures are (DeiT)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input in evaluation; checkpoints carry it."""

    input_size: int  # pixels, height and width
    crop_ratio: float  # share of the resized picture's short side that is kept
    interpolation: str  # "bicubic" or "bilinear"
    mean: tuple[float, ...]  # three values, of pictures in 0–1
    std: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


# --- of a picture --------------------------------------------------------------------------------
# The transforms draw from the global generators of Python, NumPy and torch, as timm's do. The data
# set seeds all three before each picture.


class ResizeShortSide:
    """Short side to ``size`` pixels; interpolation "random" draws bilinear or bicubic."""

    def __init__(self, size: int, interpolation: str) -> None:
        names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
        self.size = size
        self.modes = [InterpolationMode(name) for name in names]

    def __call__(self, image: Image.Image) -> Image.Image:
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        return functional.resize(image, self.size, mode)


class ThreeAugment:
    """Grey, solarised or blurred, with equal chance (DeiT III, arXiv:2204.07118, section 3)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return random.choice((self.grey, self.solarise, self.blur))(image)

    @staticmethod
    def grey(image: Image.Image) -> Image.Image:
        return image.convert("L").convert("RGB")

    @staticmethod
    def solarise(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image)

    @staticmethod
    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class TrainTransform:
    """A training picture, augmented: RGB PIL picture -> (3, S, S) float32, normalised.

    ``erase=False`` leaves out random erasing, which the data set asks of the first copy of repeated
    augmentation where ``resplit`` is set.

    Colour jitter is part of ThreeAugment and of training without a policy. As in timm and DeiT a
    policy (``aa``) takes its place, except for the policy "3a".
    """

    def __init__(self, preprocessing: Preprocessing, options: "AugmentOptions") -> None:
        steps = [*_crop(preprocessing.input_size, options)]
        if options.hflip > 0:
            steps.append(transforms.RandomHorizontalFlip(options.hflip))
        if options.vflip > 0:
            steps.append(transforms.RandomVerticalFlip(options.vflip))
        jitter = options.color_jitter
        if options.ThreeAugment:
            steps.append(ThreeAugment())
        elif options.aa is not None:
            steps.append(build_policy(options.aa, preprocessing, options.train_interpolation))
            jitter = jitter if options.aa.startswith("3a") else None
        if jitter:
            steps.append(transforms.ColorJitter(jitter, jitter, jitter))
        steps.append(_to_tensor(preprocessing))
        self.augment = transforms.Compose(steps)
        self.erasing = RandomErasing(
            options.reprob, mode=options.remode, max_count=options.recount, device="cpu"
        )
        self.resplit = options.resplit

    def __call__(self, image: Image.Image, erase: bool = True) -> torch.Tensor:
        tensor = self.augment(image)
        return self.erasing(tensor) if erase and self.erasing.probability > 0 else tensor


def _crop(size: int, options: "AugmentOptions") -> list[Callable]:
    if size <= SMALL:
        logger.info(
            "input of %d pixels: padded random crop in place of the random resized crop", size
        )
        padding = max(1, size // 8)
        resize = ResizeShortSide(size, options.train_interpolation)
        return [resize, transforms.RandomCrop(size, padding=padding)]
    if options.src:
        # DeiT III, "simple random crop"
        resize = ResizeShortSide(size, options.train_interpolation)
        return [resize, transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    return [
        RandomResizedCropAndInterpolation(
            size, options.scale, options.ratio, options.train_interpolation
        )
    ]


def _to_tensor(preprocessing: Preprocessing) -> Callable:
    normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)
    return transforms.Compose([transforms.ToTensor(), normalise])


class EvalTransform:
    """RGB PIL picture -> (3, S, S) float32, normalised: the centre of the resized picture.

    Inputs of at most 32 pixels keep the whole short side (DeiT).
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        size = preprocessing.input_size
        short_side = int(size / preprocessing.crop_ratio) if size > SMALL else size
        resize = ResizeShortSide(short_side, preprocessing.interpolation)
        self._crop = transforms.Compose([resize, transforms.CenterCrop(size)])
        self._to_tensor = _to_tensor(preprocessing)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self._to_tensor(self._crop(image))

    def crop(self, image: Image.Image) -> torch.Tensor:
        """The centre as uint8 (3, S, S), to be normalised elsewhere."""
        return functional.pil_to_tensor(self._crop(image))


_NUMBER = r"\d+(\.\d+)?"
_POLICY = re.compile(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3a|3aw)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
    r"|trivial"
)


def build_policy(name: str, preprocessing: Preprocessing, interpolation: str) -> Callable:
    """The automatic augmentation ``name``, PIL -> PIL. Raises OptionError for an unknown one."""
    # timm passes over sections that it doesn't know.
    if not _POLICY.fullmatch(name):
        raise OptionError(
            "aa",
            f"{name!r} is not a policy; e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, "
            "original-mstd0.5, v0, trivial or none",
        )
    if name == "trivial":
        return transforms.TrivialAugmentWide()
    params: dict[str, Any] = {
        "translate_const": int(preprocessing.input_size * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in preprocessing.mean),
    }
    if interpolation != "random":
        params["interpolation"] = str_to_pil_interp(interpolation)
    if name.startswith("rand"):
        return rand_augment_transform(name, params)
    if name.startswith("augmix"):
        return augment_and_mix_transform(name, {**params, "translate_pct": 0.3})
    return auto_augment_transform(name, params)


# --- of a batch ----------------------------------------------------------------------------------


def one_hot(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(B,) int64 to (B, num_classes) float32; torch's own looks at the values, and so waits."""
    zeros = torch.zeros(len(targets), num_classes, device=targets.device)
    return zeros.scatter_(1, targets[:, None], 1.0)


class Mixer:
    """Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899), each picture with its mirror place.

    ``mode`` "batch" draws once for all, "pair" once for picture i and its partner B-1-i, "elem" for
    each picture. The semantics and, for a given seed, the draws are those of timm's ``Mixup``.

    mixup, cutmix: alpha of the beta distribution, 0 turns it off
    cutmix_minmax: least and greatest side of the box, as a share of the picture; replaces alpha
    prob: chance of mixing at all; switch_prob: chance of cutmix where both are on
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
    ) -> None:
        self.num_classes = num_classes
        self.mixup = mixup
        self.cutmix = cutmix if cutmix_minmax is None else 1.0
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch; a pure function of its arguments. Odd batch sizes work.

        images: (B, C, H, W), any device; targets: (B,) int64. Returns new images and soft targets
        (B, num_classes) float32.
        """
        rng = np.random.RandomState(seed % 2**32)
        batch, _, height, width = images.shape
        if self.mode == "batch":
            lam, cut = self._draw_once(rng)
        else:
            lam, cut = self._draw_each(rng, batch if self.mode == "elem" else batch // 2)
        boxes = np.zeros((len(lam), 4), dtype=np.int64)
        for i in np.flatnonzero(cut & (lam != 1)):
            boxes[i] = y0, y1, x0, x1 = self._draw_box(rng, float(lam[i]), height, width)
            lam[i] = 1 - (y1 - y0) * (x1 - x0) / (height * width)
        if self.mode == "pair":
            # The picture in the middle of an odd batch has no partner.
            odd = batch % 2
            lam = np.concatenate([lam, np.ones(odd), lam[::-1]])
            cut = np.concatenate([cut, np.zeros(odd, dtype=bool), cut[::-1]])
            boxes = np.concatenate([boxes, np.zeros((odd, 4), dtype=np.int64), boxes[::-1]])
        return self._mix_images(images, lam, cut, boxes), self._mix_targets(targets, lam)

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

    @staticmethod
    def _mix_images(
        images: torch.Tensor, lam: np.ndarray, cut: np.ndarray, boxes: np.ndarray
    ) -> torch.Tensor:
        device = images.device
        height, width = images.shape[-2:]
        # n is B, or 1 where one draw serves the whole batch.
        there = torch.from_numpy(boxes).to(device, non_blocking=True)
        y0, y1, x0, x1 = there[..., None].unbind(1)  # each (n, 1)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        in_rows = (rows >= y0) & (rows < y1)  # (n, H)
        in_columns = (columns >= x0) & (columns < x1)  # (n, W)
        boxed = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (n, 1, H, W)
        blend = torch.from_numpy(np.where(cut, 1.0, lam)).to(images.dtype)
        blend = blend.to(device, non_blocking=True)
        weight = blend[:, None, None, None].expand(boxed.shape).masked_fill(boxed, 0.0)
        return torch.lerp(images.flip(0), images, weight)

    def _mix_targets(self, targets: torch.Tensor, lam: np.ndarray) -> torch.Tensor:
        hard = one_hot(targets, self.num_classes)
        weight = torch.from_numpy(lam).float().to(targets.device, non_blocking=True)[:, None]
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
    )
