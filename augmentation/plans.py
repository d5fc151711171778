"""What is drawn for a whole batch of training images, before the device does it.

The distributions are those of ``steps``, which draws for one image at a time. Each number is a
function of (seed, epoch, position), what it is for and, with augmentation splits, the split.
"""

from typing import TYPE_CHECKING

import numpy as np

from augmentation.draws import Draws, Numbers, between
from augmentation.erasing import draws_per_image, random_boxes
from augmentation.policy import KINDS, build_policy_draws
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import Plan
from augmentation.steps import BLUR_STD, jitter_strengths
from augmentation.transforms import erasing_probability
from augmentation.warp import corner_shifts, perspective_coefficients
from config import jitters
from samplers import NUM_REPEATS
from utils import derive_seed

if TYPE_CHECKING:
    from config import AugmentOptions

# What an image's numbers are for: each has a stream of its own.
CROP, FLIP, POLICY, JITTER, ERASE = range(5)
KERNEL, ROTATE, CORNERS, TINT = range(12, 16)

# Operations and arguments of one layer, (B,) each.
Layer = tuple[np.ndarray, np.ndarray]

_JITTERED = ("brightness", "contrast", "saturation", "hue")


class Planner:
    """Draws the plans of a recipe. Raises OptionError for a policy that doesn't exist."""

    def __init__(self, preprocessing: Preprocessing, options: "AugmentOptions", seed: int) -> None:
        self.options = options
        self.seed = seed
        self.size = preprocessing.size
        self.policy = None
        if not options.ThreeAugment and options.aa is not None:
            self.policy = build_policy_draws(options.aa, preprocessing, options.train_interpolation)
        self.jitter = jitter_strengths(options) if jitters(options) else ()
        self.erasing = erasing_probability(options)

    def draws(
        self, purpose: int, epoch: int, positions: np.ndarray, count: int, split: int = 0
    ) -> Draws:
        """``count`` numbers for each of these places of the epoch, (B,)."""
        place = ("sample", epoch, "split", split) if split else ("sample", epoch)
        return Draws(derive_seed(self.seed, *place), purpose, positions, count)

    def numbers(self, purpose: int, epoch: int, position: int) -> Numbers:
        """What ``draws`` gives for one place of the epoch, one number at a time."""
        return Numbers(derive_seed(derive_seed(self.seed, "sample", epoch), purpose), position)

    def plan(self, epoch: int, positions: np.ndarray) -> Plan:
        """What is to be done with the images at these places of the epoch.

        With S splits it is of S × B images: all clean ones, then all of the next split.
        """
        splits = self.options.aug_splits
        if not splits:
            return self._plan(epoch, positions, 0, clean=False)
        plans = [self._plan(epoch, positions, s, clean=s == 0) for s in range(splits)]
        return Plan(*(np.concatenate(arrays) for arrays in zip(*plans, strict=True)))

    def _plan(self, epoch: int, positions: np.ndarray, split: int, *, clean: bool) -> Plan:
        """That of one split. Flips and geometry are those of split 0 in all of them."""
        options = self.options
        draws = self.draws(FLIP, epoch, positions, 2)
        flips = draws.uniform(2) < (options.hflip, options.vflip)
        geometry = self._geometry_layers(epoch, positions)
        colours = [
            *self._policy_layers(epoch, positions, split),
            *self._jitter_layers(epoch, positions, split),
            *self._tint_layers(epoch, positions, split),
        ]
        layers = [*geometry, *colours]
        kinds = np.zeros((len(positions), len(layers)), dtype=np.int64)
        arguments = np.zeros(kinds.shape, dtype=np.float32)
        for number, (kind, argument) in enumerate(layers):
            kinds[:, number], arguments[:, number] = kind, argument
        if clean:
            kinds[:, len(geometry) :] = 0
        cubic = self._kernels(epoch, positions, split, len(layers))
        if split:
            cubic[:, : len(geometry)] = self._kernels(epoch, positions, 0, len(geometry))
        boxes = self._boxes(epoch, positions, split)
        return Plan(flips, kinds, arguments, cubic, *boxes, self._warps(epoch, positions))

    def _kernels(self, epoch: int, positions: np.ndarray, split: int, layers: int) -> np.ndarray:
        """Whether the kernel of each layer is the cubic one, (B, L)."""
        interpolation = self.options.train_interpolation
        if interpolation != "random":
            return np.full((len(positions), layers), interpolation == "bicubic")
        draws = self.draws(KERNEL, epoch, positions, layers or 1, split)
        return draws.uniform(layers) < 0.5

    def _geometry_layers(self, epoch: int, positions: np.ndarray) -> list[Layer]:
        """Rotation, and perspective, whose argument is in ``Plan.warps``."""
        layers: list[Layer] = []
        reach, count = self.options.rotate, len(positions)
        if reach > 0:
            draws = self.draws(ROTATE, epoch, positions, 1)
            degrees = between(draws.uniform(), -reach, reach)
            layers.append((np.full(count, KINDS.index("rotate")), degrees))
        if self.options.perspective > 0:
            layers.append((np.full(count, KINDS.index("perspective")), np.zeros(count)))
        return layers

    def _warps(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Coefficients of the perspective, (B, 8) float32, or (B, 0)."""
        scale = self.options.perspective
        if not scale > 0:
            return np.zeros((len(positions), 0), dtype=np.float32)
        draws = self.draws(CORNERS, epoch, positions, 8)
        return perspective_coefficients(corner_shifts(draws, self.size, scale), self.size)

    def _policy_layers(self, epoch: int, positions: np.ndarray, split: int) -> list[Layer]:
        if self.options.ThreeAugment:
            draws = self.draws(POLICY, epoch, positions, 2, split)
            choice = np.array([KINDS.index(k) for k in ("grey", "solarize", "blur")])
            kinds = choice[(draws.uniform() * 3).astype(np.int64)]
            std = between(draws.uniform(), 0.1, 2.0)
            return [(kinds, np.where(kinds == choice[1], 128, std))]
        if self.policy is None:
            return []
        draws = self.draws(POLICY, epoch, positions, self.policy.draws, split)
        kinds, arguments = self.policy.draw(draws)
        return list(zip(kinds.T, arguments.T, strict=True))

    def _jitter_layers(self, epoch: int, positions: np.ndarray, split: int) -> list[Layer]:
        """Brightness, contrast, saturation and hue, in an order of each image's own."""
        if not self.jitter:
            return []
        count, strengths = len(self.jitter), np.array(self.jitter)
        draws = self.draws(JITTER, epoch, positions, 2 * count + 1, split)
        order = np.argsort(draws.uniform(count), axis=1)  # (B, 3 or 4)
        low, high = np.maximum(0.0, 1 - strengths), 1 + strengths
        if count == 4:
            low[3], high[3] = -strengths[3], strengths[3]
        factors = between(draws.uniform(count), low[order], high[order])
        kinds = np.array([KINDS.index(name) for name in _JITTERED[:count]])
        kinds = np.where(strengths > 0, kinds, 0)[order]
        jittered = draws.uniform(1) < self.options.color_jitter_prob
        return list(zip(np.where(jittered, kinds, 0).T, factors.T, strict=True))

    def _tint_layers(self, epoch: int, positions: np.ndarray, split: int) -> list[Layer]:
        """Grey, then blurred."""
        options = self.options
        if not (options.grayscale_prob > 0 or options.blur_prob > 0):
            return []
        draws = self.draws(TINT, epoch, positions, 3, split)
        grey, blurred = (draws.uniform(2) < (options.grayscale_prob, options.blur_prob)).T
        std = between(draws.uniform(), *BLUR_STD)
        layers: list[Layer] = []
        if options.grayscale_prob > 0:
            layers.append((np.where(grey, KINDS.index("grey"), 0), np.zeros(len(grey))))
        if options.blur_prob > 0:
            layers.append((np.where(blurred, KINDS.index("gaussian"), 0), std))
        return layers

    def _boxes(
        self, epoch: int, positions: np.ndarray, split: int
    ) -> tuple[np.ndarray, np.ndarray]:
        options, batch = self.options, len(positions)
        if not self.erasing > 0:
            return np.zeros((batch, 0, 4), dtype=np.int64), np.zeros((batch, 0), dtype=np.int64)
        draws = self.draws(ERASE, epoch, positions, draws_per_image(options.recount), split)
        if options.aug_splits:
            spared = np.full(batch, options.resplit and split == 0)
        else:
            spared = options.resplit & (positions % NUM_REPEATS == 0)
        return random_boxes(draws, self.erasing, options.recount, self.size, spared)
