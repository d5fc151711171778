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
from torchvision.transforms.functional import pil_to_tensor

from augmentation.crops import (
    ATTEMPTS,
    random_offsets,
    random_rectangle,
    resize,
    resize_short_side,
    take_crops,
)
from augmentation.draws import Draws, between
from augmentation.erasing import draws_per_image, erase, noise_table, random_boxes
from augmentation.pixel_ops import GEOMETRY, LEVELS
from augmentation.policy import KINDS, ON_DEVICE, Policy
from augmentation.preprocessing import SMALL, Preprocessing
from augmentation.protocol import Parts, Plan, StoreTransform, Transform
from augmentation.transforms import TrainTransform, erasing_probability, margin, pillow_filter
from augmentation.windows import is_made_whole, short_side, window
from samplers import NUM_REPEATS
from utils import derive_seed

if TYPE_CHECKING:
    from config import AugmentOptions

# What an image's numbers are for: each has a stream of its own.
CROP, FLIP, POLICY, JITTER, ERASE = range(5)
KERNEL = 12

# Levels that a CPU works on at a time, so that its caches hold them: two images of 224 pixels.
CHUNK = 2 * 3 * 224**2

# Operations and arguments of one layer, (B,) each.
Layer = tuple[np.ndarray, np.ndarray]


class Normalise:
    """uint8 (B, 3, S, S) to float32, by mean and std, as torchvision's transforms do."""

    def __init__(self, preprocessing: Preprocessing) -> None:
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
        values = torch.empty_like(images, dtype=torch.float32)
        at_once = _at_once(images)
        for part, result in zip(images.split(at_once), values.split(at_once), strict=True):
            result.copy_(part).div_(255).sub_(mean).div_(std)
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
        self.size = preprocessing.input_size
        self.least = self.size if options.jpeg_scaling == "on" else None
        self.pads = self.size <= SMALL or options.src
        self.margin = margin(self.size)
        self.policy = None
        self.jitter = options.color_jitter or 0.0
        if not options.ThreeAugment and options.aa is not None:
            self.policy = Policy(options.aa, preprocessing, options.train_interpolation)
            if not options.aa.startswith("3a"):
                self.jitter = 0.0
        fill = [min(255, round(255 * m)) for m in preprocessing.mean]
        self._constants["fill"] = torch.tensor(fill, dtype=torch.uint8)
        self.erasing = erasing_probability(options)
        if self.erasing > 0 and options.remode != "const":
            generator = torch.Generator().manual_seed(derive_seed(seed, "noise") % 2**63)
            self._constants["noise"] = noise_table(self.size, generator)

    def _draws(self, purpose: int, epoch: int, positions: np.ndarray, count: int) -> Draws:
        return Draws(derive_seed(self.seed, "sample", epoch), purpose, positions, count)

    # --- on the host, per image ------------------------------------------------------------------

    def apply(self, image: Tensor | Parts, epoch: int, position: int) -> Tensor:
        """The crop: uint8 (3, H, W) to uint8 (3, S, S)."""
        image = image if isinstance(image, Parts) else Parts(image)
        draws = self._draws(CROP, epoch, np.array([position]), 2 * ATTEMPTS + 3)
        options, size = self.options, self.size
        interpolation = options.train_interpolation
        if interpolation == "random":
            interpolation = "bilinear" if draws.uniform()[0] < 0.5 else "bicubic"
        if self.pads:
            if self._grows_huge(image.size):
                return self._window(image.whole().pixels, interpolation, draws)
            image = self.padded(resize_short_side(image, size, interpolation, self.least))
            top, left = random_offsets(draws, image.shape[1] - size, image.shape[2] - size)
            return image[:, top[0] : top[0] + size, left[0] : left[0] + size]
        box = random_rectangle(draws, *image.size, options.scale, options.ratio)
        return resize(image.part(box, self.least), (size, size), interpolation)

    def _grows_huge(self, size: Sequence[int]) -> bool:
        """Whether an image of this height and width is too narrow to be resized as a whole."""
        return not is_made_whole(size[::-1], short_side(size[::-1], self.size))

    def _window(self, image: Tensor, interpolation: str, draws: Draws) -> Tensor:
        """The crop of an image that grows huge, with Pillow's filters."""
        resized = short_side((image.shape[2], image.shape[1]), self.size)
        rows, columns = (length + 2 * self.margin - self.size for length in resized[::-1])
        top, left = (int(place[0]) - self.margin for place in random_offsets(draws, rows, columns))
        fill = (0, 0, 0) if self.size <= SMALL else None
        cut = window(
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()),
            resized,
            (left, top),
            self.size,
            pillow_filter(interpolation),
            fill,
        )
        return pil_to_tensor(cut)

    # --- on the host or the device, images that are kept ------------------------------------------

    def for_store(self) -> "BatchAugment | None":
        """Itself where the crop moves whole pixels and images are always resized alike."""
        alike = self.options.train_interpolation != "random"
        return self if self.pads and alike else None

    def keep(self, image: Tensor | Parts) -> Tensor:
        image = image if isinstance(image, Parts) else Parts(image)
        if self._grows_huge(image.size):
            return image.whole().pixels
        interpolation = self.options.train_interpolation
        return resize_short_side(image, self.size, interpolation, self.least)

    def padded(self, images: Tensor) -> Tensor:
        """(…, 3, H, W) with its margin: black around small images, mirrored in ``src``."""
        if self.size <= SMALL:
            return F.pad(images, [self.margin] * 4)
        # There is no reflection of bytes.
        return F.pad(images.float(), [self.margin] * 4, mode="reflect").to(images.dtype)

    def take(
        self, images: Tensor, indices: np.ndarray, epoch: int, positions: np.ndarray
    ) -> Tensor:
        draws = self._draws(CROP, epoch, positions, 2 * ATTEMPTS + 3)
        rows, columns = (side - self.size for side in images.shape[2:])
        return take_crops(images, indices, *random_offsets(draws, rows, columns), self.size)

    # --- on the host, per batch ------------------------------------------------------------------

    def plan(self, epoch: int, positions: np.ndarray) -> Plan:
        """What is to be done with the images at these places of the epoch."""
        options = self.options
        draws = self._draws(FLIP, epoch, positions, 2)
        flips = draws.uniform(2) < (options.hflip, options.vflip)
        layers = [*self._policy_layers(epoch, positions), *self._jitter_layers(epoch, positions)]
        kinds = np.zeros((len(positions), len(layers)), dtype=np.int64)
        arguments = np.zeros(kinds.shape, dtype=np.float32)
        for number, (kind, argument) in enumerate(layers):
            kinds[:, number], arguments[:, number] = kind, argument
        if options.train_interpolation == "random":
            draws = self._draws(KERNEL, epoch, positions, len(layers) or 1)
            cubic = draws.uniform(len(layers)) < 0.5
        else:
            cubic = np.full(kinds.shape, options.train_interpolation == "bicubic")
        return Plan(flips, kinds, arguments, cubic, *self._boxes(epoch, positions))

    def _policy_layers(self, epoch: int, positions: np.ndarray) -> list[Layer]:
        if self.options.ThreeAugment:
            draws = self._draws(POLICY, epoch, positions, 2)
            choice = np.array([KINDS.index(k) for k in ("grey", "solarize", "blur")])
            kinds = choice[(draws.uniform() * 3).astype(np.int64)]
            std = between(draws.uniform(), 0.1, 2.0)
            return [(kinds, np.where(kinds == choice[1], 128, std))]
        if self.policy is None:
            return []
        draws = self._draws(POLICY, epoch, positions, self.policy.draws)
        kinds, arguments = self.policy.draw(draws)
        return list(zip(kinds.T, arguments.T, strict=True))

    def _jitter_layers(self, epoch: int, positions: np.ndarray) -> list[Layer]:
        """Brightness, contrast and saturation, in an order of each image's own."""
        if not self.jitter:
            return []
        draws = self._draws(JITTER, epoch, positions, 6)
        names = ("brightness", "contrast", "saturation")
        order = np.argsort(draws.uniform(3), axis=1)  # (B, 3)
        kinds = np.array([KINDS.index(k) for k in names])[order]
        factors = between(draws.uniform(3), max(0.0, 1 - self.jitter), 1 + self.jitter)
        return list(zip(kinds.T, factors.T, strict=True))

    def _boxes(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        options, batch = self.options, len(positions)
        if not self.erasing > 0:
            return np.zeros((batch, 0, 4), dtype=np.int64), np.zeros((batch, 0), dtype=np.int64)
        draws = self._draws(ERASE, epoch, positions, draws_per_image(options.recount))
        spared = options.resplit & (positions % NUM_REPEATS == 0)
        return random_boxes(draws, self.erasing, options.recount, self.size, spared)

    # --- on the device, per batch ----------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """uint8 (B, 3, S, S) to float32, normalised; augmented if there is a ``plan``."""
        if plan is None:
            return super().__call__(images)
        values = super().__call__(self.alter(images, plan))
        noise = None
        if "noise" in self._constants:
            noise = self.constant("noise", values.device)
        return erase(values, plan.boxes, plan.noise, self.options.remode, noise)

    @torch.no_grad()
    def alter(self, images: Tensor, plan: Plan) -> Tensor:
        """Flips and the policy: uint8 to uint8 images, new ones if there is anything to do."""
        if not (plan.flips.any() or plan.kinds.any()):
            return images
        images = flipped(images, plan.flips)
        arguments = torch.from_numpy(plan.arguments).to(images.device, non_blocking=True)
        for layer in range(plan.kinds.shape[1]):
            for kind in np.unique(plan.kinds[:, layer]):
                if kind:
                    which = plan.kinds[:, layer] == kind
                    cubic = plan.cubic[:, layer]
                    self._operate(KINDS[kind], images, arguments[:, layer], which, cubic)
        return images

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


def flipped(images: Tensor, flips: np.ndarray) -> Tensor:
    """Images flipped left to right and upside down, (B, 2) bool; always new ones."""
    images = images.clone()
    for axis, flip in zip((3, 2), flips.T, strict=True):
        _change(images, flip, lambda part, _, axis=axis: part.flip(axis))
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
    return options.ThreeAugment or options.aa is None or bool(ON_DEVICE.fullmatch(options.aa))


def augments_by_batch(options: "AugmentOptions") -> bool:
    """Whether a run augments by the batch on the device, rather than one by one in the workers."""
    return options.augment_on != "cpu" and supports(options)


def build_train_transform(
    preprocessing: Preprocessing, options: "AugmentOptions", seed: int
) -> Transform:
    """The transform of a run's training images: ``BatchAugment`` where that can be had."""
    kind = BatchAugment if augments_by_batch(options) else TrainTransform
    return kind(preprocessing, options, seed)
