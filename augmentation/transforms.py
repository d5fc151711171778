"""One image at a time: crops, the transforms of training and evaluation."""

import contextlib
import logging
import random
import re
from collections.abc import Callable, Iterator
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
from timm.data.transforms import (
    RandomResizedCropAndInterpolation,
    interp_mode_to_str,
    str_to_pil_interp,
)
from torchvision import transforms
from torchvision.transforms import functional

from augmentation.crops import resize_by_pillow
from augmentation.preprocessing import SMALL, Preprocessing
from augmentation.protocol import Parts, StoreTransform, Transform
from augmentation.windows import Size, centre, long_side, short_side, window
from errors import OptionError
from samplers import NUM_REPEATS
from utils import derive_seed, seed_host

if TYPE_CHECKING:
    from config import AugmentOptions

logger = logging.getLogger(__name__)


class PaddedRandomCrop:
    """Short side to ``size`` pixels, a border of a few around, a random square of it.

    Interpolation "random" draws bilinear or bicubic. The border is black, or the mirrored image.
    Draws and pixels are those of torchvision's ``Resize`` and ``RandomCrop``.
    """

    def __init__(
        self, size: int, interpolation: str, *, mirror: bool, least: int | None = None
    ) -> None:
        names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
        self.size, self.margin, self.least = size, margin(size), least
        self.filters = [pillow_filter(name) for name in names]
        self.fill = None if mirror else (0, 0, 0)

    def __call__(self, image: Image.Image | Parts) -> Image.Image:
        resample = random.choice(self.filters) if len(self.filters) > 1 else self.filters[0]
        parts = image if isinstance(image, Parts) else None
        resized = short_side(parts.size[::-1] if parts else image.size, self.size)
        if parts:
            cut = parts.whole(self.least)
            as_it_is = cut.pixels.shape[1:] if cut.inner is None else resized[::-1]
            image = resize_by_pillow(cut, as_it_is, resample)
        room = [length + 2 * self.margin - self.size + 1 for length in resized]
        top, left = (int(torch.randint(0, room[axis], (1,))) for axis in (1, 0))
        corner = left - self.margin, top - self.margin
        return window(image, resized, corner, self.size, resample, self.fill)


class RandomResizedCrop:
    """timm's random resized crop of an image that may not be decoded yet: its draws and pixels.

    ``least``: the crop may be decoded at a part of its size, as of ``Parts``.
    """

    def __init__(self, size: int, options: "AugmentOptions", least: int | None) -> None:
        self.crop = RandomResizedCropAndInterpolation(
            size, options.scale, options.ratio, options.train_interpolation
        )
        self.least = least

    def __call__(self, image: Image.Image | Parts) -> Image.Image:
        if not isinstance(image, Parts):
            return self.crop(image)
        sized = torch.empty(3, *image.size, device="meta")  # timm asks for nothing but the size
        box = self.crop.get_params(sized, self.crop.scale, self.crop.ratio)
        filters = self.crop.interpolation
        chosen = random.choice(filters) if isinstance(filters, tuple | list) else filters
        resample = Image.Resampling[interp_mode_to_str(chosen).upper()]
        return resize_by_pillow(image.part(box, self.least), self.crop.size, resample)


def margin(size: int) -> int:
    """Pixels of the border that the random crop of ``size`` pixels may show."""
    return max(1, size // 8) if size <= SMALL else 4


def pillow_filter(name: str) -> Image.Resampling:
    """Pillow's filter of an interpolation by name."""
    return Image.Resampling[name.upper()]


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


def erasing_probability(options: "AugmentOptions") -> float:
    """Probability of random erasing; ThreeAugment has none (DeiT's ``new_data_aug_generator``)."""
    return 0.0 if options.ThreeAugment else options.reprob


class TrainTransform(Transform):
    """A training image, augmented: RGB PIL image -> (3, S, S) float32, normalised.

    ``apply`` seeds the draws; a plain call draws from the host's global generators as they stand.
    ``erase=False`` leaves out random erasing, as ``apply`` does for the first copy of repeated
    augmentation where ``resplit`` is set.

    Colour jitter is part of ThreeAugment and of training without a policy. As in timm and DeiT a
    policy (``aa``) takes its place, except for the policy "3a".
    """

    takes_parts = True

    def __init__(
        self, preprocessing: Preprocessing, options: "AugmentOptions", seed: int = 0
    ) -> None:
        self.seed = seed
        self.background = preprocessing.background
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
            erasing_probability(options),
            mode=options.remode,
            max_count=options.recount,
            device="cpu",
        )
        self.resplit = options.resplit

    def __call__(self, image: Image.Image | Parts, erase: bool = True) -> torch.Tensor:
        tensor = self.augment(image)
        return self.erasing(tensor) if erase and self.erasing.probability > 0 else tensor

    def apply(self, image: Image.Image | Parts, epoch: int, position: int) -> torch.Tensor:
        erase = not (self.resplit and position % NUM_REPEATS == 0)
        with _host_generators(derive_seed(self.seed, "sample", epoch, position)):
            return self(image, erase=erase)


@contextlib.contextmanager
def _host_generators(seed: int) -> Iterator[None]:
    """Seed the host's global generators, and put them back as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_host(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _crop(size: int, options: "AugmentOptions") -> list[Callable]:
    least = size if options.jpeg_scaling == "on" else None
    interpolation = options.train_interpolation
    if size <= SMALL:
        logger.info(
            "input of %d pixels: padded random crop in place of the random resized crop", size
        )
        return [PaddedRandomCrop(size, interpolation, mirror=False, least=least)]
    if options.src:
        # DeiT III, "simple random crop"
        return [PaddedRandomCrop(size, interpolation, mirror=True, least=least)]
    return [RandomResizedCrop(size, options, least)]


def _to_tensor(preprocessing: Preprocessing) -> Callable:
    normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)
    return transforms.Compose([transforms.ToTensor(), normalise])


class CentreCrop(StoreTransform):
    """RGB PIL image -> (3, S, S) uint8, the centre of the resized image; normalised elsewhere.

    ``crop_mode`` says what is resized. The pixels are timm's.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.background = preprocessing.background
        self.size = preprocessing.input_size
        self.side = preprocessing.resized_side
        self.resample = pillow_filter(preprocessing.interpolation)
        self.resized_to = _RESIZED[preprocessing.crop_mode]
        self.fill = preprocessing.border

    def crop(self, image: Image.Image) -> Image.Image:
        """The part that the model sees, an RGB image of S × S pixels."""
        resized = self.resized_to(image.size, self.side)
        left, top = (centre(length, self.size) for length in resized)
        return window(image, resized, (left, top), self.size, self.resample, self.fill)

    def apply(self, image: Image.Image, epoch: int, position: int) -> torch.Tensor:
        return self.keep(image)

    def for_store(self) -> "CentreCrop":
        return self

    def keep(self, image: Image.Image) -> torch.Tensor:
        return functional.pil_to_tensor(self.crop(image))

    def take(
        self, images: torch.Tensor, indices: np.ndarray, epoch: int, positions: np.ndarray
    ) -> torch.Tensor:
        return images[torch.from_numpy(indices).to(images.device, non_blocking=True)]


# By crop mode.
_RESIZED: dict[str, Callable[[Size, int], Size]] = {
    "center": short_side,
    "squash": lambda size, side: (side, side),
    "border": long_side,
}


class EvalTransform(Transform):
    """RGB PIL image -> (3, S, S) float32, normalised: the centre, as of ``CentreCrop``."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.background = preprocessing.background
        self.crop = CentreCrop(preprocessing).crop
        self.normalise = _to_tensor(preprocessing)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.normalise(self.crop(image))

    def apply(self, image: Image.Image, epoch: int, position: int) -> torch.Tensor:
        return self.normalise(self.crop(image))


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


def build_transform(
    is_train: bool, preprocessing: Preprocessing, augment: "AugmentOptions", *, seed: int = 0
) -> TrainTransform | EvalTransform:
    """RGB PIL image -> (3, S, S) float32: augmented for training, else the centre crop.

    ``seed`` is that of the training draws.
    """
    if is_train:
        return TrainTransform(preprocessing, augment, seed)
    return EvalTransform(preprocessing)
