"""What every transform can do: the one protocol of the one-by-one and the batch path.

An image is made in four steps: the loader decodes it as ``decode_as`` says, ``apply`` makes a
tensor of it, ``plan`` draws what is left to do with a batch of them, and the device does that
(``BatchAugment`` and ``Normalise`` are called with images and plan). Where the device is the CPU,
whoever makes the batch does the greater part of it (``alter``).

What is drawn is a function of (seed, epoch, position) alone, so a batch is the same for every
number of workers and after a resume.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from architectures.sizes import ImageSize


class Plan(NamedTuple):
    """What is to be done with each image of a batch; arrays of the host.

    With S augmentation splits it has S × B rows: all images as they are, then all of them again for
    each further split; B images that meet it are repeated first.
    """

    flips: np.ndarray
    """(B, 2) bool: left to right, upside down."""
    kinds: np.ndarray
    """(B, L) int64: operations one after the other, numbers of ``policy.KINDS``."""
    arguments: np.ndarray
    """(B, L) float32: the argument of each operation."""
    cubic: np.ndarray
    """(B, L) bool: kernel of the geometric operations."""
    boxes: np.ndarray
    """(B, K, 4) int64: y0, y1, x0, x1 that are erased; empty where nothing is."""
    noise: np.ndarray
    """(B, K) int64: where in the table of noise a box begins."""
    warps: np.ndarray
    """(B, 8) float32: coefficients of the perspective; empty where there is none."""

    def of(self, part: slice) -> "Plan":
        """The plan of some of the images."""
        return Plan(*(array[part] for array in self))

    def altered(self) -> "Plan":
        """What is left when the images have been altered: to erase."""
        none = np.zeros_like(self.flips)
        return self._replace(flips=none, kinds=self.kinds[:, :0], warps=self.warps[:, :0])


Box = tuple[int, int, int, int]
"""Top, left, height and width of a part of an image, in pixels."""


class Cut(NamedTuple):
    """A part of an image."""

    pixels: Tensor
    """uint8 (3, H, W)."""
    inner: tuple[float, float, float, float] | None = None
    """Where in ``pixels`` it lies, left, top, right and bottom, if it was decoded at a part of its
    size; None: it is all of them."""


class Parts:
    """An image of which parts are asked for; here one that is decoded, uint8 (3, H, W)."""

    size: tuple[int, int]
    """Height and width in pixels, of the upright image."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.size = pixels.shape[1], pixels.shape[2]

    def part(self, box: Box, least: ImageSize | None = None) -> Cut:
        """A part of the upright image.

        ``least``: it may be decoded at a part of its size, as long as both sides keep so many
        pixels, or its height and width each theirs; None: as it is.
        """
        top, left, height, width = box
        return Cut(self.pixels[:, top : top + height, left : left + width])

    def whole(self, least: ImageSize | None = None) -> Cut:
        """All of the image, as of :meth:`part`."""
        return self.part((0, 0, *self.size), least)


class Form(NamedTuple):
    """The kind of images that a model takes."""

    channels: int = 3
    """Three are red, green and blue, one is grey; others are the bands of a file."""
    bit_depth: int = 8
    """8 (0-255) or 16 (0-65535) bits of each pixel and channel."""

    @property
    def levels(self) -> int:
        """The greatest value, which becomes 1."""
        return 2**self.bit_depth - 1

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel, all channels together."""
        return self.channels * self.bit_depth // 8


RGB = Form()


class Transform:
    """How the images of a data set become tensors."""

    form: Form = RGB
    """What is decoded; of other forms than RGB ``apply`` takes uint8 or uint16 (C, H, W)."""
    decode_as: Literal["PIL", "tensor"] = "PIL"
    """What ``apply`` takes: an RGB Pillow image, or uint8 (3, H, W)."""
    takes_parts: bool = False
    """Whether ``apply`` takes ``Parts`` too, and asks for what it needs of an image alone."""
    background: str = "white"
    """What transparent images are decoded on, as of ``pipeline.decoding.decode``."""
    by_batch: bool = False
    """Whether augmentation is left to the device, which does it by the batch."""
    alone: str = ""
    """The option because of which it can't be, as ``config.one_by_one`` has it."""

    def apply(self, image: Any, epoch: int, position: int) -> Tensor:
        """A decoded image as (3, H, W), augmented for its position of the epoch.

        float32 is ready for the model; uint8 is still to be normalised, and to be augmented
        where there is a ``plan``.
        """
        raise NotImplementedError

    def plan(self, epoch: int, positions: np.ndarray) -> Plan | None:
        """What is left to do with the images at these positions, (B,); None: nothing."""
        return None

    def for_store(self) -> "StoreTransform | None":
        """How images are kept in one tensor and taken from it by the batch.

        None where each image has to be made by itself.
        """
        return None

    def alter(self, images: Tensor, plan: Plan) -> Tensor:
        """Do all of ``plan`` that leaves images uint8; ``plan.altered()`` is the rest."""
        return images


class StoreTransform(Transform):
    """A transform whose images can be kept ready and taken by the batch (``pipeline.cache``)."""

    size: tuple[int, int]
    """Height and width of what the model takes; what is kept lies just around it."""

    def keep(self, image: Any) -> Tensor:
        """A decoded image as it is kept, uint8 (3, H, W): all that is the same in each epoch.

        One that would become huge by that stays as it is.
        """
        raise NotImplementedError

    def padded(self, images: Tensor) -> Tensor:
        """Kept images of one size, (N, 3, H, W), with the margin that ``take`` crops from."""
        return images

    def take(
        self, images: Tensor, indices: np.ndarray, epoch: int, positions: np.ndarray
    ) -> Tensor:
        """As ``apply``, of many images at once: uint8 (B, 3, H, W) on their device.

        Args:
            images: (N, 3, H, W) as of ``padded``.
            indices: (B,), which of them.
            positions: (B,), the places of the epoch that they take.
        """
        raise NotImplementedError
