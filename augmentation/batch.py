"""Augmentation of whole batches, on the device that holds them.

The counterpart of ``transforms.TrainTransform``, which works on one Pillow image at a time. Workers
crop and resize uint8 images (``BatchAugment.apply``) and draw what is to be done with each
(``BatchAugment.plan``); flips, the policy, normalisation and erasing are done on the batch.

What is drawn is a function of (seed, epoch, position) alone, as everywhere, but from a generator
that gives a whole batch its numbers at once; the distributions are timm's.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from augmentation.bands import rounded, window_of_bands
from augmentation.crops import (
    bytes_of,
    movable,
    random_offset,
    random_offsets,
    random_rectangle,
    resize,
    resize_around,
    take_crops,
)
from augmentation.draws import Numbers
from augmentation.erasing import erase, noise_table
from augmentation.keep_ratio import keep_ratio_crop
from augmentation.pixel_ops import GEOMETRY, LEVELS
from augmentation.plans import CROP, Planner
from augmentation.policy import KINDS
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import RGB, Parts, Plan, StoreTransform, Transform
from augmentation.steps import mean_colour
from augmentation.transforms import TrainTransform, margin, pillow_filter
from augmentation.windows import around, is_made_whole, window
from config import one_by_one
from utils import derive_seed

if TYPE_CHECKING:
    from config import AugmentOptions

# Levels that a CPU works on at a time, so that its caches hold them: two images of 224 pixels.
CHUNK = 2 * 3 * 224**2


class Normalise:
    """uint8 or uint16 (B, C, H, W) to float32, by mean and std, as torchvision's transforms do.

    The greatest level becomes 1: 255 or 65535.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.form = preprocessing.form
        self._constants = {
            "mean": torch.tensor(preprocessing.mean)[:, None, None],
            "std": torch.tensor(preprocessing.std)[:, None, None],
        }

    def constant(self, name: str, device: torch.device) -> Tensor:
        """One of the tensors that don't change, on ``device``."""
        value = self._constants[name]
        if value.device != device:
            value = self._constants[name] = value.to(device, non_blocking=True)
        return value

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are started anew must not take a device's tensors with them.
        constants = {name: value.cpu() for name, value in self._constants.items()}
        return {**self.__dict__, "_constants": constants}

    def __call__(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """``plan`` is for those that augment too."""
        mean, std = (self.constant(name, images.device) for name in ("mean", "std"))
        values = torch.empty(images.shape, device=images.device)  # planes, however images lie
        at_once = _at_once(images)
        for part, result in zip(images.split(at_once), values.split(at_once), strict=True):
            result.copy_(part).div_(self.form.levels).sub_(mean).div_(std)
        return values


class BatchAugment(Normalise, StoreTransform):
    """A recipe's augmentation of batches: ``apply`` and ``plan`` on the host, the rest on a device.

    Raises OptionError (``build_policy``) for a policy that doesn't exist.
    """

    decode_as = "tensor"
    takes_parts = True
    by_batch = True

    def __init__(self, preprocessing: Preprocessing, options: "AugmentOptions", seed: int) -> None:
        super().__init__(preprocessing)
        self.options = options
        self.seed = seed
        self.background = preprocessing.background
        self.size = preprocessing.size
        self.least = self.size if options.jpeg_scaling == "on" else None
        self.is_small = preprocessing.is_small
        self.keeps_ratio = options.train_crop_mode != "rrc"
        self.pads = (self.is_small or options.src) and not self.keeps_ratio
        self.margin = margin(self.size)
        self.planner = Planner(preprocessing, options, seed)
        kind = torch.uint8 if self.form.bit_depth == 8 else torch.float32
        self._constants["fill"] = torch.tensor(mean_colour(preprocessing), dtype=kind)
        if self.planner.erasing > 0 and options.remode != "const":
            generator = torch.Generator().manual_seed(derive_seed(seed, "noise") % 2**63)
            self._constants["noise"] = noise_table(self.size, generator, self.form.channels)

    # --- on the host, per image ------------------------------------------------------------------

    def apply(self, image: Tensor | Parts, epoch: int, position: int) -> Tensor:
        """The crop: uint8 or uint16 (C, H, W) to the same of (C, *size)."""
        image = image if isinstance(image, Parts) else Parts(image)
        numbers = self.planner.numbers(CROP, epoch, position)
        options, size = self.options, self.size
        interpolation = options.train_interpolation
        if interpolation == "random":
            interpolation = "bilinear" if numbers[0] < 0.5 else "bicubic"
            numbers = numbers.after(1)
        if self.pads:
            if self._grows_huge(image.size):
                return self._window(image.whole().pixels, interpolation, numbers)
            image = self.padded(resize_around(image, size, interpolation, self.least))
            rows, columns = image.shape[1] - size[0], image.shape[2] - size[1]
            top, left = random_offset(numbers, rows, columns)
            return image[:, top : top + size[0], left : left + size[1]]
        if self.keeps_ratio:
            return keep_ratio_crop(image, numbers, options, size, interpolation, self.least)
        box = random_rectangle(numbers, *image.size, options.scale, options.ratio)
        return resize(image.part(box, self.least), size, interpolation)

    def _grows_huge(self, size: Sequence[int]) -> bool:
        """Whether an image of this height and width is too narrow to be resized as a whole."""
        return not is_made_whole(size[::-1], around(size[::-1], self.size[::-1]))

    def _window(self, image: Tensor, interpolation: str, numbers: Numbers) -> Tensor:
        """The crop of an image that grows huge, with Pillow's filters."""
        resized = around((image.shape[2], image.shape[1]), self.size[::-1])
        rows, columns = (
            old + 2 * self.margin - new for old, new in zip(resized[::-1], self.size, strict=True)
        )
        top, left = (start - self.margin for start in random_offset(numbers, rows, columns))
        fill = (0,) * len(image) if self.is_small else None
        corner, resample = (left, top), pillow_filter(interpolation)
        if self.form != RGB:
            return window_of_bands(image, resized, corner, self.size[::-1], resample, fill)
        whole = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return bytes_of(window(whole, resized, corner, self.size[::-1], resample, fill))

    # --- on the host or the device, images that are kept ------------------------------------------

    def for_store(self) -> "BatchAugment | None":
        """Itself where the crop moves whole pixels, images are always resized alike and come once
        each."""
        alike = self.options.train_interpolation != "random" and not self.options.aug_splits
        return self if self.pads and alike else None

    def keep(self, image: Tensor | Parts) -> Tensor:
        image = image if isinstance(image, Parts) else Parts(image)
        if self._grows_huge(image.size):
            return image.whole().pixels
        interpolation = self.options.train_interpolation
        return resize_around(image, self.size, interpolation, self.least)

    def padded(self, images: Tensor) -> Tensor:
        """(…, 3, H, W) with its margin: black around small images, mirrored in ``src``."""
        if self.is_small:
            return F.pad(movable(images), [self.margin] * 4).view(images.dtype)
        # There is no reflection of bytes.
        return F.pad(images.float(), [self.margin] * 4, mode="reflect").to(images.dtype)

    def take(
        self, images: Tensor, indices: np.ndarray, epoch: int, positions: np.ndarray
    ) -> Tensor:
        draws = self.planner.draws(CROP, epoch, positions, 2)
        rows, columns = images.shape[2] - self.size[0], images.shape[3] - self.size[1]
        return take_crops(images, indices, *random_offsets(draws, rows, columns), self.size)

    # --- on the host, per batch ------------------------------------------------------------------

    def plan(self, epoch: int, positions: np.ndarray) -> Plan:
        return self.planner.plan(epoch, positions)

    # --- on the device, per batch ----------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """uint8 or uint16 (B, C, H, W) to float32, normalised; augmented if there is a ``plan``."""
        if plan is None:
            return super().__call__(images)
        values = super().__call__(self.alter(images, plan))
        noise = None
        if "noise" in self._constants:
            noise = self.constant("noise", values.device)
        return erase(values, plan.boxes, plan.noise, self.options.remode, noise)

    @torch.no_grad()
    def alter(self, images: Tensor, plan: Plan) -> Tensor:
        """Splits, flips, geometry and colours: uint8 or uint16 images to the same, new ones if
        there is anything to do. 16 bits are rounded once, at the end."""
        if len(plan.flips) > len(images):
            images = images.repeat(len(plan.flips) // len(images), 1, 1, 1)
        if not (plan.flips.any() or plan.kinds.any()):
            return images
        images = flipped(images, plan.flips)
        if not plan.kinds.any():
            return images
        deep = images.dtype == torch.uint16
        if deep:
            images = images.float()
        arguments, warps = (
            torch.from_numpy(values).to(images.device, non_blocking=True)
            for values in (plan.arguments, plan.warps)
        )
        for layer in range(plan.kinds.shape[1]):
            for kind in np.unique(plan.kinds[:, layer]):
                if kind:
                    which = plan.kinds[:, layer] == kind
                    cubic = plan.cubic[:, layer]
                    given = warps if KINDS[kind] == "perspective" else arguments[:, layer]
                    self._operate(KINDS[kind], images, given, which, cubic)
        return rounded(images) if deep else images

    def _operate(
        self, kind: str, images: Tensor, arguments: Tensor, which: np.ndarray, cubic: np.ndarray
    ) -> None:
        """Do ``kind`` to the images ``which``, (B,) bool, in place."""
        if kind in LEVELS:
            _change(images, which, lambda part, index: LEVELS[kind](part, arguments[index]))
            return
        operation, fill = GEOMETRY[kind], self.constant("fill", images.device)
        for smooth in (False, True):
            _change(
                images,
                which & (cubic == smooth),
                lambda part, index, smooth=smooth: operation(part, arguments[index], smooth, fill),
            )


class OneByOne(BatchAugment):
    """The same, one image at a time in the workers, of images that Pillow has no operations for."""

    by_batch = False

    def apply(self, image: Tensor | Parts, epoch: int, position: int) -> Tensor:
        """uint8 or uint16 (C, H, W) to float32 (C, *size), normalised; of splits (S, C, *size)."""
        plan = self.planner.plan(epoch, np.array([position]))
        made = self(super().apply(image, epoch, position)[None], plan)
        return made if self.options.aug_splits else made[0]

    def plan(self, epoch: int, positions: np.ndarray) -> None:
        return None

    def for_store(self) -> None:
        return None


def flipped(images: Tensor, flips: np.ndarray) -> Tensor:
    """Images flipped left to right and upside down, (B, 2) bool; always new ones, in planes."""
    images = images.clone(memory_format=torch.contiguous_format)
    moved = movable(images)
    for axis, flip in zip((3, 2), flips.T, strict=True):
        _change(moved, flip, lambda part, _, axis=axis: part.flip(axis))
    return images


def _change(
    images: Tensor, which: np.ndarray, operation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Put what ``operation`` makes of the images ``which``, (B,) bool, in their place.

    It takes images and their numbers, both on the images' device, which isn't waited for.
    """
    chosen = np.flatnonzero(which)
    if images.device.type != "cpu":
        if len(chosen):
            index = torch.from_numpy(chosen).to(images.device, non_blocking=True)
            images[index] = operation(images[index], index)
        return
    # NumPy copies an image whole, where torch's index goes from level to level.
    pixels, at_once = images.numpy(), _at_once(images)
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        pixels[part] = operation(torch.from_numpy(pixels[part]), torch.from_numpy(part)).numpy()


def _at_once(images: Tensor) -> int:
    """How many of the images to work on at a time."""
    size = images[0].numel() if len(images) and images.device.type == "cpu" else 0
    return max(1, CHUNK // size if size else len(images))


def supports(options: "AugmentOptions") -> bool:
    """Whether all of a recipe's augmentation can be done on batches."""
    return not one_by_one(options)


def augments_by_batch(options: "AugmentOptions") -> bool:
    """Whether a run augments by the batch on the device, rather than one by one in the workers."""
    return options.augment_on != "cpu" and supports(options)


def build_train_transform(
    preprocessing: Preprocessing, options: "AugmentOptions", seed: int
) -> Transform:
    """The transform of a run's training images: ``BatchAugment`` where that can be had."""
    if augments_by_batch(options):
        return BatchAugment(preprocessing, options, seed)
    kind = TrainTransform if preprocessing.form == RGB else OneByOne
    return kind(preprocessing, options, seed)
