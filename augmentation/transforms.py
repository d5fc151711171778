"""One image at a time: crops, the transforms of training and evaluation."""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import (
    RandomResizedCropAndInterpolation,
    interp_mode_to_str,
)
from torchvision import transforms

from architectures.sizes import ImageSize, size_text
from augmentation.bands import window_of_bands
from augmentation.crops import bytes_of, movable, resize_by_pillow
from augmentation.keep_ratio import KeepRatioCrop
from augmentation.preprocessing import SMALL, Preprocessing
from augmentation.protocol import RGB, Parts, StoreTransform, Transform
from augmentation.steps import colours, geometry
from augmentation.windows import Size, around, centre, window, within
from config import one_by_one
from samplers import NUM_REPEATS
from utils import derive_seed, seed_host

if TYPE_CHECKING:
    from config import AugmentOptions

logger = logging.getLogger(__name__)


class PaddedRandomCrop:
    """Resized just around ``size`` (height, width), a border of a few pixels, a random part of it.

    Interpolation "random" draws bilinear or bicubic. The border is black, or the mirrored image.
    Draws and pixels are those of torchvision's ``Resize`` and ``RandomCrop``.
    """

    def __init__(
        self,
        size: tuple[int, int],
        interpolation: str,
        *,
        mirror: bool,
        least: ImageSize | None = None,
    ) -> None:
        names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
        self.size, self.margin, self.least = size, margin(size), least
        self.filters = [pillow_filter(name) for name in names]
        self.fill = None if mirror else (0, 0, 0)

    def __call__(self, image: Image.Image | Parts) -> Image.Image:
        resample = random.choice(self.filters) if len(self.filters) > 1 else self.filters[0]
        parts = image if isinstance(image, Parts) else None
        size = self.size[::-1]
        resized = around(parts.size[::-1] if parts else image.size, size)
        if parts:
            cut = parts.whole(self.least)
            as_it_is = cut.pixels.shape[1:] if cut.inner is None else resized[::-1]
            image = resize_by_pillow(cut, as_it_is, resample)
        room = [old + 2 * self.margin - new + 1 for old, new in zip(resized, size, strict=True)]
        top, left = (int(torch.randint(0, room[axis], (1,))) for axis in (1, 0))
        corner = left - self.margin, top - self.margin
        return window(image, resized, corner, size, resample, self.fill)


class RandomResizedCrop:
    """timm's random resized crop of an image that may not be decoded yet: its draws and pixels.

    ``least``: the crop may be decoded at a part of its size, as of ``Parts``.
    """

    def __init__(
        self, size: tuple[int, int], options: "AugmentOptions", least: ImageSize | None
    ) -> None:
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


def margin(size: tuple[int, int]) -> int:
    """Pixels of the border that the random crop of ``size`` (height, width) may show."""
    return max(1, min(size) // 8) if max(size) <= SMALL else 4


def pillow_filter(name: str) -> Image.Resampling:
    """Pillow's filter of an interpolation by name."""
    return Image.Resampling[name.upper()]


def erasing_probability(options: "AugmentOptions") -> float:
    """Probability of random erasing; ThreeAugment has none (DeiT's ``new_data_aug_generator``)."""
    return 0.0 if options.ThreeAugment else options.reprob


class TrainTransform(Transform):
    """A training image, augmented: RGB PIL image -> (3, H, W) float32, normalised.

    ``apply`` seeds the draws; a plain call draws from the host's global generators as they stand.
    ``erase=False`` leaves out random erasing, as ``apply`` does for the first copy of repeated
    augmentation where ``resplit`` is set.

    With ``aug_splits`` the result is (splits, 3, H, W): the same crop and flips, first as they are,
    then augmented anew each (timm's ``AugMixDataset``); ``resplit`` then spares the first.

    Colour jitter is part of ThreeAugment and of training without a policy. As in timm and DeiT a
    policy (``aa``) takes its place, except for the policy "3a".
    """

    takes_parts = True

    def __init__(
        self, preprocessing: Preprocessing, options: "AugmentOptions", seed: int = 0
    ) -> None:
        self.seed = seed
        self.background = preprocessing.background
        crop = _crop(preprocessing.size, options)
        self.base = transforms.Compose([*crop, *geometry(preprocessing, options)])
        self.augment = transforms.Compose(colours(preprocessing, options))
        self.to_tensor = _to_tensor(preprocessing)
        self.erasing = RandomErasing(
            erasing_probability(options),
            mode=options.remode,
            max_count=options.recount,
            device="cpu",
        )
        self.resplit = options.resplit
        self.splits = options.aug_splits
        self.alone = one_by_one(options)

    def __call__(self, image: Image.Image | Parts, erase: bool = True) -> torch.Tensor:
        base = self.base(image)
        if not self.splits:
            return self._finish(self.augment(base), erase)
        clean = self._finish(base, erase and not self.resplit)
        others = [self._finish(self.augment(base), erase) for _ in range(self.splits - 1)]
        return torch.stack([clean, *others])

    def _finish(self, image: Image.Image, erase: bool) -> torch.Tensor:
        tensor = self.to_tensor(image)
        return self.erasing(tensor) if erase and self.erasing.probability > 0 else tensor

    def apply(self, image: Image.Image | Parts, epoch: int, position: int) -> torch.Tensor:
        erase = bool(self.splits) or not (self.resplit and position % NUM_REPEATS == 0)
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


def _crop(size: tuple[int, int], options: "AugmentOptions") -> list[Callable]:
    least = size if options.jpeg_scaling == "on" else None
    interpolation = options.train_interpolation
    if options.train_crop_mode != "rrc":
        return [KeepRatioCrop(size, options, least)]
    if max(size) <= SMALL:
        logger.info(
            "input of %s pixels: padded random crop in place of the random resized crop",
            size_text(size),
        )
        return [PaddedRandomCrop(size, interpolation, mirror=False, least=least)]
    if options.src:
        # DeiT III, "simple random crop"
        return [PaddedRandomCrop(size, interpolation, mirror=True, least=least)]
    return [RandomResizedCrop(size, options, least)]


def _to_tensor(preprocessing: Preprocessing) -> Callable:
    normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)
    form = preprocessing.form
    scale = transforms.ToTensor() if form == RGB else partial(_scaled, levels=form.levels)
    return transforms.Compose([scale, normalise])


def _scaled(image: torch.Tensor, levels: int) -> torch.Tensor:
    return image.float().div_(levels)


class CentreCrop(StoreTransform):
    """RGB PIL image -> (3, H, W) uint8, the centre of the resized image; normalised elsewhere.

    ``crop_mode`` says what is resized. The pixels are timm's.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.background = preprocessing.background
        self.size = preprocessing.size
        self.target = preprocessing.resized_size[::-1]
        self.resample = pillow_filter(preprocessing.interpolation)
        self.resized_to = _RESIZED[preprocessing.crop_mode]
        self.fill = preprocessing.border
        self.form = preprocessing.form

    def crop(self, image: Image.Image) -> Image.Image:
        """The part that the model sees, an RGB image of the input's size."""
        return window(image, *self._place(image.size), self.resample, self.fill)

    def _place(self, image: Size) -> tuple[Size, Size, Size]:
        """What an image's size becomes, and left and top and size of what is cut out of that."""
        resized, size = self.resized_to(image, self.target), self.size[::-1]
        left, top = (centre(length, side) for length, side in zip(resized, size, strict=True))
        return resized, (left, top), size

    def apply(self, image: Image.Image, epoch: int, position: int) -> torch.Tensor:
        return self.keep(image)

    def for_store(self) -> "CentreCrop":
        return self

    def keep(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        if self.form == RGB:
            return bytes_of(self.crop(image))
        height, width = image.shape[1:]
        place = self._place((width, height))
        return window_of_bands(image, *place, self.resample, self.fill)

    def take(
        self, images: torch.Tensor, indices: np.ndarray, epoch: int, positions: np.ndarray
    ) -> torch.Tensor:
        index = torch.from_numpy(indices).to(images.device, non_blocking=True)
        return movable(images)[index].view(images.dtype)


def _squashed(size: Size, target: Size) -> Size:
    return target


# By crop mode; functions with names, which go to other processes.
_RESIZED: dict[str, Callable[[Size, Size], Size]] = {
    "center": around,
    "squash": _squashed,
    "border": within,
}


class EvalTransform(Transform):
    """A decoded image -> (C, H, W) float32, normalised: the centre, as of ``CentreCrop``."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.background = preprocessing.background
        self.form = preprocessing.form
        centre_crop = CentreCrop(preprocessing)
        self.crop = centre_crop.crop if self.form == RGB else centre_crop.keep
        self.normalise = _to_tensor(preprocessing)

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        return self.normalise(self.crop(image))

    def apply(self, image: Image.Image | torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        return self.normalise(self.crop(image))


def build_transform(
    is_train: bool, preprocessing: Preprocessing, augment: "AugmentOptions", *, seed: int = 0
) -> TrainTransform | EvalTransform:
    """RGB PIL image -> (3, H, W) float32: augmented for training, else the centre crop.

    ``seed`` is that of the training draws.
    """
    if is_train:
        return TrainTransform(preprocessing, augment, seed)
    return EvalTransform(preprocessing)
