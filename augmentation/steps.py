"""What is done to one training image after its crop, by Pillow: PIL image in and out."""

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.transforms import str_to_pil_interp
from torchvision import transforms
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode

from augmentation.own import Albumentations, OwnTransform
from augmentation.preprocessing import Preprocessing
from config import jitters
from errors import OptionError

if TYPE_CHECKING:
    from config import AugmentOptions

Step = Callable[[Image.Image], Image.Image]

BLUR_STD = (0.1, 2.0)  # pixels, of timm's Gaussian blur
BLUR_TAPS = 23  # of its kernel
TABLES = {"cifar10": AutoAugmentPolicy.CIFAR10, "svhn": AutoAugmentPolicy.SVHN}


# --- the chain ------------------------------------------------------------------------------------


def geometry(preprocessing: Preprocessing, options: "AugmentOptions") -> list[Step]:
    """Flips, rotation and perspective: what all splits of an image have alike."""
    steps: list[Step] = []
    if options.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(options.hflip))
    if options.vflip > 0:
        steps.append(transforms.RandomVerticalFlip(options.vflip))
    fill = mean_colour(preprocessing)
    if options.rotate > 0:
        steps.append(
            _interpolated(
                options,
                lambda mode: transforms.RandomRotation(options.rotate, mode, fill=fill),
            )
        )
    if options.perspective > 0:
        steps.append(
            _interpolated(
                options,
                lambda mode: transforms.RandomPerspective(options.perspective, 1.0, mode, fill),
            )
        )
    return steps


def colours(preprocessing: Preprocessing, options: "AugmentOptions") -> list[Step]:
    """What follows the geometry: one's own, a policy, and colours, in timm's order."""
    steps: list[Step] = []
    if options.albumentations:
        steps.append(Albumentations(options.albumentations))
    if options.transform:
        steps.append(OwnTransform(options.transform))
    if options.ThreeAugment:
        steps.append(ThreeAugment())
    elif options.aa is not None:
        steps.append(build_policy(options.aa, preprocessing, options.train_interpolation))
    if jitters(options):
        jitter = transforms.ColorJitter(*jitter_strengths(options))
        certain = options.color_jitter_prob == 1
        steps.append(
            jitter if certain else transforms.RandomApply([jitter], options.color_jitter_prob)
        )
    if options.grayscale_prob > 0:
        steps.append(transforms.RandomGrayscale(options.grayscale_prob))
    if options.blur_prob > 0:
        steps.append(transforms.RandomApply([GaussianBlur()], options.blur_prob))
    return steps


def mean_colour(preprocessing: Preprocessing) -> tuple[int, ...]:
    """What comes from outside of an image, 0–255, or 0–65535 of 16 bits."""
    levels = preprocessing.form.levels
    return tuple(min(levels, round(levels * m)) for m in preprocessing.mean)


def jitter_strengths(options: "AugmentOptions") -> tuple[float, ...]:
    """Of brightness, contrast, saturation and, where it is asked for, hue; 0 leaves one out."""
    jitter = options.color_jitter or 0.0
    if not isinstance(jitter, tuple):
        return (jitter,) * 3
    return jitter[:3] if len(jitter) == 4 and jitter[3] == 0 else jitter


def _interpolated(
    options: "AugmentOptions", build: Callable[[InterpolationMode], Callable]
) -> Callable:
    """A geometric step with the filter of training, or one of the two by chance."""
    name = options.train_interpolation
    names = ("bilinear", "bicubic") if name == "random" else (name,)
    built = [build(InterpolationMode(name)) for name in names]
    return transforms.RandomChoice(built) if len(built) > 1 else built[0]


class GaussianBlur:
    """A Gaussian blur of 0.1 to 2 pixels: draws and pixels of timm's."""

    def __call__(self, image: Image.Image) -> Image.Image:
        # The kernel's reach is mirrored, so it must be less than the image.
        taps = min(BLUR_TAPS, 2 * min(image.size) - 1)
        return transforms.GaussianBlur(taps, BLUR_STD)(image)


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


# --- policies -------------------------------------------------------------------------------------

_NUMBER = r"\d+(\.\d+)?"
_POLICY = re.compile(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3a|3aw)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
    r"|cifar10|svhn|trivial"
)


def build_policy(name: str, preprocessing: Preprocessing, interpolation: str) -> Callable:
    """The automatic augmentation ``name``, PIL -> PIL. Raises OptionError for an unknown one."""
    # timm passes over sections that it doesn't know.
    if not _POLICY.fullmatch(name):
        raise OptionError(
            "aa",
            f"{name!r} is not a policy; e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, "
            "original-mstd0.5, v0, cifar10, svhn, trivial or none",
        )
    if name == "trivial":
        return transforms.TrivialAugmentWide()
    fill = mean_colour(preprocessing)
    if name in TABLES:
        return TablePolicy(name, fill, interpolation)
    params: dict[str, Any] = {
        "translate_const": int(min(preprocessing.size) * 0.45),
        "img_mean": fill,
    }
    if interpolation != "random":
        params["interpolation"] = str_to_pil_interp(interpolation)
    if name.startswith("rand"):
        return rand_augment_transform(name, params)
    if name.startswith("augmix"):
        return augment_and_mix_transform(name, {**params, "translate_pct": 0.3})
    return auto_augment_transform(name, params)


class TablePolicy(transforms.AutoAugment):
    """AutoAugment's policy for CIFAR-10 or SVHN (Cubuk et al. 2019, arXiv:1805.09501, appendix),
    with torchvision's tables, draws and magnitudes.

    Interpolation "random" draws bilinear or bicubic for each image.
    """

    def __init__(self, name: str, fill: tuple[int, ...], interpolation: str) -> None:
        self.random = interpolation == "random"
        mode = InterpolationMode.BILINEAR if self.random else InterpolationMode(interpolation)
        super().__init__(TABLES[name], mode, list(fill))

    def forward(self, image: Image.Image) -> Image.Image:
        if self.random:
            names = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
            self.interpolation = random.choice(names)
        return super().forward(image)
