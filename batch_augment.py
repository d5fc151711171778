"""Augmentation of whole batches, on the device that holds them, with draws a picture.

The counterpart of ``augment.TrainTransform``, which works on one Pillow picture at a time. Loader
processes crop and resize uint8 pictures (``BatchAugment.crop``) and draw what is to be done with
each (``BatchAugment.plan``); flips, the policy, normalisation and erasing are done on the batch.

What is drawn is a function of (seed, epoch, position) alone, as everywhere, but from a generator
that gives a whole batch its numbers at once; the distributions are timm's.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.auto_augment import AugmentOp, RandAugment

import batch_ops
from augment import SMALL, Preprocessing, build_policy
from samplers import NUM_REPEATS
from utils import derive_seed

if TYPE_CHECKING:
    from config import AugmentOptions

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ATTEMPTS = 10  # tries at a rectangle that fits, as in timm and torchvision
NOISE = 1 << 20  # numbers that random erasing fills in from
# What a picture's numbers are for: each has a stream of its own.
CROP, FLIP, POLICY, JITTER, ERASE = range(5)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), (B, count) float64: a function of ``seed`` and each position alone.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in counter mode, with a stream a position.
    """
    start = _mix(positions.astype(np.uint64) * GOLDEN + np.uint64(seed))
    places = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_mix(start[:, None] + places) >> np.uint64(11)) * 2.0**-53


class _Draws:
    """Numbers of a batch for one purpose, handed out column by column."""

    def __init__(self, seed: int, purpose: int, positions: np.ndarray, count: int) -> None:
        self.values = uniforms(derive_seed(seed, purpose), positions, count)
        self.used = 0

    def uniform(self, *shape: int) -> np.ndarray:
        """(B, *shape), in [0, 1)."""
        count = int(np.prod(shape, dtype=np.int64))
        taken = self.values[:, self.used : self.used + count]
        if taken.shape[1] < count:
            raise ValueError(f"more than {self.values.shape[1]} numbers were drawn")
        self.used += count
        return taken.reshape(len(taken), *shape)

    def normal(self, *shape: int) -> np.ndarray:
        """(B, *shape), standard normal (Box and Muller)."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(*shape)))
        return radius * np.cos(2 * np.pi * self.uniform(*shape))

    def sign(self, *shape: int) -> np.ndarray:
        """(B, *shape), −1 or 1."""
        return np.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def below(self, limit: np.ndarray) -> np.ndarray:
        """Whole numbers from 0 to ``limit`` − 1, of its shape (B, …)."""
        return (self.uniform(*limit.shape[1:]) * limit).astype(np.int64)


# --- the policy ---------------------------------------------------------------------------------

# Operations in the order of their numbers in a plan; 0 is none.
KINDS = ("none", *batch_ops.LEVELS, *batch_ops.GEOMETRY)
_SUFFIX = re.compile(r"(Increasing|Original|Rel|Rand)$")
_KIND_OF = {
    **{name: name.lower() for name in ("Equalize", "Invert", "Rotate", "Posterize", "Solarize")},
    **{name: name.lower() for name in ("Contrast", "Brightness", "Sharpness")},
    "AutoContrast": "autocontrast",
    "SolarizeAdd": "solarize_add",
    "Color": "saturation",
    "Desaturate": "saturation",
    "GaussianBlur": "blur",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
}
ON_DEVICE = re.compile(r"(rand|original|v0|3a).*")


def kind_of(name: str) -> int:
    """The number in a plan of timm's operation ``name``."""
    return KINDS.index(_KIND_OF[_SUFFIX.sub("", name)])


def argument(
    name: str, level: np.ndarray, draws: _Draws, size: int, hparams: dict[str, Any]
) -> np.ndarray:
    """The argument of timm's operation ``name`` at ``level`` (0 to 10, or above), (B,)."""
    share, sign = level / 10, draws.sign()
    if name.startswith("Rotate"):
        return share * 30 * sign
    if name.startswith("Shear"):
        return share * 0.3 * sign
    if name.startswith("Translate"):
        # timm's Rel is a share of the side, its other a number of pixels.
        relative = name.endswith("Rel")
        reach = hparams.get("translate_pct", 0.45) * size
        reach = reach if relative else hparams["translate_const"]
        return share * reach * sign
    if name.startswith("Posterize"):
        bits = np.trunc(share * 4)
        increasing = name.endswith("Increasing")
        return 4 - bits if increasing else bits + 4 * name.endswith("Original")
    if name == "SolarizeAdd":
        return np.minimum(128, np.trunc(share * 110))
    if name.startswith("Solarize"):
        threshold = np.minimum(256, np.trunc(share * 256))
        return 256 - threshold if name.endswith("Increasing") else threshold
    if name == "Desaturate":
        return 1 - np.clip(0.5 + 0.5 * share, 0.5, 1.0)
    if name == "GaussianBlur":
        return np.clip(0.1 + 1.9 * share, 0.1, 2.0)
    if name == "GaussianBlurRand":
        return 0.1 + (2 * np.clip(share, 0, 1) - 0.1) * draws.uniform()
    if name.endswith("Increasing"):
        return np.maximum(0.1, 1 + share * 0.9 * sign)
    if _KIND_OF[name] in ("saturation", "contrast", "brightness", "sharpness"):
        return share * 1.8 + 0.1
    return np.zeros_like(level)


class Policy:
    """What timm's automatic augmentation ``name`` would do, for a batch of pictures at once."""

    def __init__(self, name: str, preprocessing: Preprocessing, interpolation: str) -> None:
        policy = build_policy(name, preprocessing, interpolation)
        self.size = preprocessing.input_size
        if isinstance(policy, RandAugment):
            self.ops: list[AugmentOp] = list(policy.ops)
            self.layers = policy.num_layers
            self.weights = policy.choice_weights
            self.rows = None
        else:
            self.ops = [op for row in policy.policy for op in row]
            self.layers = len(policy.policy[0])
            self.rows = np.arange(len(self.ops)).reshape(-1, self.layers)
        self.numbers = {
            key: np.array([getattr(op, key) for op in self.ops], dtype=np.float64)
            for key in ("prob", "magnitude", "magnitude_std")
        }
        self.most = np.array([op.magnitude_max or 10 for op in self.ops], dtype=np.float64)
        self.names = sorted({op.name for op in self.ops})
        self.name_of = np.array([self.names.index(op.name) for op in self.ops])

    @property
    def draws(self) -> int:
        """Numbers that a picture takes at most."""
        return 1 + len(self.ops) + self.layers * (4 + 2 * len(self.names))

    def draw(self, draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
        """Operations by number, (B, layers) int64, and their arguments, (B, layers) float32."""
        which = self._choose(draws)
        level = self.numbers["magnitude"][which]
        std = self.numbers["magnitude_std"][which]
        finite = np.where(np.isinf(std), 0.0, std)
        noisy = level + finite * draws.normal(self.layers)
        level = np.where(np.isinf(std), level * draws.uniform(self.layers), noisy)
        level = np.clip(level, 0, self.most[which])
        names = self.name_of[which]
        kinds = np.zeros_like(names)
        arguments = np.zeros(names.shape)
        for layer in range(self.layers):
            for number, name in enumerate(self.names):
                value = argument(name, level[:, layer], draws, self.size, self.ops[0].hparams)
                mine = names[:, layer] == number
                kinds[mine, layer] = kind_of(name)
                arguments[mine, layer] = value[mine]
        applied = draws.uniform(self.layers) < self.numbers["prob"][which]
        return np.where(applied, kinds, 0), arguments.astype(np.float32)

    def _choose(self, draws: _Draws) -> np.ndarray:
        """Numbers of the operations, (B, layers)."""
        if self.rows is not None:
            return self.rows[(draws.uniform() * len(self.rows)).astype(np.int64)]
        if self.weights is None:
            return (draws.uniform(self.layers) * len(self.ops)).astype(np.int64)
        # Weighted and without repetition (Efraimidis and Spirakis, 2006).
        with np.errstate(divide="ignore"):
            keys = np.log(draws.uniform(len(self.ops))) / np.maximum(self.weights, 1e-300)
        return np.argsort(-keys, axis=1)[:, : self.layers]


# --- the plan -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is to be done with each picture of a batch; arrays of the host."""

    flips: np.ndarray  # (B, 2) bool: left to right, upside down
    kinds: np.ndarray  # (B, L) int64: operations one after the other, numbers of KINDS
    arguments: np.ndarray  # (B, L) float32
    cubic: np.ndarray  # (B, L) bool: kernel of the geometric operations
    boxes: np.ndarray  # (B, K, 4) int64: y0, y1, x0, x1 that are erased; empty where nothing is
    noise: np.ndarray  # (B, K) int64: where in the table of noise a box begins

    def of(self, part: slice) -> "Plan":
        """The plan of some of the pictures."""
        return Plan(*(array[part] for array in self))

    def altered(self) -> "Plan":
        """What is left when the pictures have been altered: to erase."""
        none = np.zeros_like(self.flips)
        return self._replace(flips=none, kinds=self.kinds[:, :0])


class Normalise:
    """uint8 (B, 3, S, S) to float32, by mean and deviation, as torchvision's transforms do."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._constants = {
            "mean": torch.tensor(preprocessing.mean)[:, None, None],
            "std": torch.tensor(preprocessing.std)[:, None, None],
        }

    def constant(self, name: str, device: torch.device) -> torch.Tensor:
        """One of the tensors that don't change, on ``device``."""
        value = self._constants[name]
        if value.device != device:
            value = self._constants[name] = value.to(device)
        return value

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes that are started anew must not take a device's tensors with them.
        constants = {name: value.cpu() for name, value in self._constants.items()}
        return {**self.__dict__, "_constants": constants}

    def __call__(self, images: torch.Tensor, plan: "Plan | None" = None) -> torch.Tensor:
        """``plan`` is for those that augment too."""
        values = images.to(torch.float32).div_(255)
        values.sub_(self.constant("mean", images.device))
        return values.div_(self.constant("std", images.device))


class BatchAugment(Normalise):
    """A recipe's augmentation of batches; ``crop`` and ``plan`` on the host, the rest on a device.

    Raises OptionError (``build_policy``) for a policy that doesn't exist.
    """

    def __init__(self, preprocessing: Preprocessing, options: "AugmentOptions", seed: int) -> None:
        super().__init__(preprocessing)
        self.options = options
        self.seed = seed
        self.size = preprocessing.input_size
        self.pads = self.size <= SMALL or options.src
        self.policy = None
        self.jitter = options.color_jitter or 0.0
        if not options.ThreeAugment and options.aa is not None:
            self.policy = Policy(options.aa, preprocessing, options.train_interpolation)
            if not options.aa.startswith("3a"):
                self.jitter = 0.0
        fill = [min(255, round(255 * m)) for m in preprocessing.mean]
        self._constants["fill"] = torch.tensor(fill, dtype=torch.uint8)
        if options.reprob > 0 and options.remode != "const":
            generator = torch.Generator().manual_seed(derive_seed(seed, "noise") % 2**63)
            self._constants["noise"] = torch.randn(NOISE + 3 * self.size**2, generator=generator)

    # --- on the host, a picture ------------------------------------------------------------------

    def crop(self, image: torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        """uint8 (3, H, W) to uint8 (3, S, S), drawn for this place of the epoch."""
        draws = self._draws(CROP, epoch, np.array([position]), 2 * ATTEMPTS + 3)
        interpolation = self.options.train_interpolation
        if interpolation == "random":
            interpolation = "bilinear" if draws.uniform()[0] < 0.5 else "bicubic"
        if self.pads:
            image = resize_short_side(image, self.size, interpolation)
            top, left = self.offsets(draws, *image.shape[1:])
            return self.padded(image)[:, top[0] :, left[0] :][:, : self.size, : self.size]
        top, left, height, width = self._rectangle(draws, *image.shape[1:])
        part = image[:, top : top + height, left : left + width]
        return resize(part, (self.size, self.size), interpolation)

    def _draws(self, purpose: int, epoch: int, positions: np.ndarray, count: int) -> _Draws:
        return _Draws(derive_seed(self.seed, "sample", epoch), purpose, positions, count)

    def _rectangle(self, draws: _Draws, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the random resized crop (arXiv:1409.4842)."""
        options = self.options
        area = height * width * _between(draws.uniform(ATTEMPTS)[0], *options.scale)
        ratio = np.exp(_between(draws.uniform(ATTEMPTS)[0], *np.log(options.ratio)))
        widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = np.flatnonzero(
            (widths <= width) & (heights <= height) & (widths > 0) & (heights > 0)
        )
        place = draws.uniform(2)[0]
        if len(fits):
            crop_h, crop_w = int(heights[fits[0]]), int(widths[fits[0]])
            top, left = int(place[0] * (height - crop_h + 1)), int(place[1] * (width - crop_w + 1))
            return top, left, crop_h, crop_w
        # The middle, as near to the allowed ratios as it can be.
        least, most = options.ratio
        crop_h = height if width / height >= least else round(width / least)
        crop_w = width if width / height <= most else round(height * most)
        return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w

    @property
    def padding(self) -> int:
        """Pixels around a small picture, or one of the simple random crop."""
        return max(1, self.size // 8) if self.size <= SMALL else 4

    def padded(self, images: torch.Tensor) -> torch.Tensor:
        """(…, 3, H, W) with its margin: black around small pictures, mirrored in ``src``."""
        margin = [self.padding] * 4
        if self.size <= SMALL:
            return F.pad(images, margin)
        # There is no reflection of bytes.
        return F.pad(images.float(), margin, mode="reflect").to(images.dtype)

    def offsets(self, draws: _Draws, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, (B,) each, at which the crops of the padded pictures begin."""
        place = draws.uniform(2)
        room = [side + 2 * self.padding - self.size + 1 for side in (height, width)]
        return (place[:, 0] * room[0]).astype(np.int64), (place[:, 1] * room[1]).astype(np.int64)

    def take(
        self, padded: torch.Tensor, indices: np.ndarray, epoch: int, positions: np.ndarray
    ) -> torch.Tensor:
        """As ``crop``, of many pictures at once: uint8 (B, 3, S, S) on their device.

        padded: (N, 3, H, W), pictures whose short side is S, with their margins (``padded``)
        indices, positions: (B,), which of them, and the places of the epoch that they take

        Raises ValueError if the crop isn't one that moves whole pixels.
        """
        if not self.pads:
            raise ValueError("a random resized crop takes one picture at a time")
        draws = self._draws(CROP, epoch, positions, 2 * ATTEMPTS + 3)
        if self.options.train_interpolation == "random":
            draws.uniform()
        height, width = (side - 2 * self.padding for side in padded.shape[2:])
        top, left = self.offsets(draws, height, width)
        if padded.device.type == "cpu":
            return self._take_on_host(padded, indices, top, left)
        device, side = padded.device, torch.arange(self.size, device=padded.device)
        which, top, left = (
            torch.from_numpy(x).to(device, non_blocking=True)[:, None, None]
            for x in (indices, top, left)
        )
        # Advanced indexing puts the channels last: (B, S, S, 3).
        cut = padded[which, :, top + side[:, None], left + side]
        return cut.permute(0, 3, 1, 2).contiguous()

    def _take_on_host(
        self, padded: torch.Tensor, indices: np.ndarray, top: np.ndarray, left: np.ndarray
    ) -> torch.Tensor:
        # Rows of a slice are copied whole, which beats an index for every pixel.
        source = padded.numpy()
        result = np.empty((len(indices), 3, self.size, self.size), dtype=np.uint8)
        places = zip(indices.tolist(), top.tolist(), left.tolist(), strict=True)
        for place, (i, y, x) in enumerate(places):
            result[place] = source[i, :, y : y + self.size, x : x + self.size]
        return torch.from_numpy(result)

    # --- on the host, a batch --------------------------------------------------------------------

    def plan(self, epoch: int, positions: np.ndarray) -> Plan:
        """What is to be done with the pictures at these places of the epoch."""
        options, batch = self.options, len(positions)
        draws = self._draws(FLIP, epoch, positions, 2)
        flips = draws.uniform(2) < (options.hflip, options.vflip)
        columns = [*self._policy_columns(epoch, positions), *self._jitter_columns(epoch, positions)]
        kinds = np.zeros((batch, len(columns)), dtype=np.int64)
        arguments = np.zeros((batch, len(columns)), dtype=np.float32)
        for layer, (kind, value) in enumerate(columns):
            kinds[:, layer], arguments[:, layer] = kind, value
        if options.train_interpolation == "random":
            mode = self._draws(POLICY + 10, epoch, positions, len(columns) or 1)
            cubic = mode.uniform(len(columns)) < 0.5
        else:
            cubic = np.full(kinds.shape, options.train_interpolation == "bicubic")
        return Plan(flips, kinds, arguments, cubic, *self._boxes(epoch, positions))

    def _policy_columns(
        self, epoch: int, positions: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Operations and arguments of each layer of the policy."""
        if self.options.ThreeAugment:
            draws = self._draws(POLICY, epoch, positions, 2)
            choice = np.array([KINDS.index(k) for k in ("grey", "solarize", "blur")])
            kind = choice[(draws.uniform() * 3).astype(np.int64)]
            deviation = _between(draws.uniform(), 0.1, 2.0)
            return [(kind, np.where(kind == choice[1], 128, deviation))]
        if self.policy is None:
            return []
        draws = self._draws(POLICY, epoch, positions, self.policy.draws)
        kinds, arguments = self.policy.draw(draws)
        return list(zip(kinds.T, arguments.T, strict=True))

    def _jitter_columns(
        self, epoch: int, positions: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Brightness, contrast and saturation, in an order of each picture's own."""
        if not self.jitter:
            return []
        draws = self._draws(JITTER, epoch, positions, 6)
        names = ("brightness", "contrast", "saturation")
        order = np.argsort(draws.uniform(3), axis=1)  # (B, 3)
        kinds = np.array([KINDS.index(k) for k in names])[order]
        factors = _between(draws.uniform(3), max(0.0, 1 - self.jitter), 1 + self.jitter)
        return list(zip(kinds.T, factors.T, strict=True))

    def _boxes(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rectangles that random erasing (arXiv:1708.04896) fills, and where their noise begins."""
        options, size, batch = self.options, self.size, len(positions)
        most = options.recount if options.reprob > 0 else 0
        boxes = np.zeros((batch, most, 4), dtype=np.int64)
        if not most:
            return boxes, np.zeros((batch, 0), dtype=np.int64)
        draws = self._draws(ERASE, epoch, positions, 2 + most * (2 * ATTEMPTS + 3))
        erased = draws.uniform() < options.reprob
        count = 1 + (draws.uniform() * most).astype(np.int64)
        if options.resplit:
            erased &= positions % NUM_REPEATS != 0
        area = size**2 * _between(draws.uniform(most, ATTEMPTS), 0.02, 1 / 3) / count[:, None, None]
        aspect = np.exp(_between(draws.uniform(most, ATTEMPTS), np.log(0.3), np.log(1 / 0.3)))
        heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (heights < size) & (widths < size)
        first = fits.argmax(2)[..., None]
        height = np.take_along_axis(heights, first, 2)[..., 0].astype(np.int64)  # (B, K)
        width = np.take_along_axis(widths, first, 2)[..., 0].astype(np.int64)
        top, left = draws.below(size - height + 1), draws.below(size - width + 1)
        wanted = erased[:, None] & fits.any(2) & (np.arange(most) < count[:, None])
        boxes[wanted] = np.stack([top, top + height, left, left + width], -1)[wanted]
        return boxes, (draws.uniform(most) * NOISE).astype(np.int64)

    # --- on the device, a batch ------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, plan: Plan | None = None) -> torch.Tensor:
        """uint8 (B, 3, S, S) to float32, normalised; augmented if there is a ``plan``."""
        if plan is None:
            return super().__call__(images)
        return self._erase(super().__call__(self.alter(images, plan)), plan)

    @torch.no_grad()
    def alter(self, images: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Flips and the policy: uint8 to uint8."""
        return self._apply(self._turn(images, plan.flips), plan)

    @staticmethod
    def _turn(images: torch.Tensor, flips: np.ndarray) -> torch.Tensor:
        """Flipped pictures, always new ones: what comes after works in place."""
        images = images.clone()
        for axis, flip in zip((3, 2), flips.T, strict=True):
            if not flip.any():
                continue
            if images.device.type == "cpu":
                pixels = images.numpy()
                pixels[flip] = np.flip(pixels[flip], axis)
            else:
                which = _index(flip, images.device)
                images[which] = images[which].flip(axis)
        return images

    def _apply(self, images: torch.Tensor, plan: Plan) -> torch.Tensor:
        arguments = torch.from_numpy(plan.arguments).to(images.device, non_blocking=True)
        for layer in range(plan.kinds.shape[1]):
            for number in np.unique(plan.kinds[:, layer]):
                if number:
                    mine = plan.kinds[:, layer] == number
                    self._apply_one(KINDS[number], images, arguments[:, layer], mine,
                                    plan.cubic[:, layer])  # fmt: skip
        return images

    def _apply_one(
        self,
        kind: str,
        images: torch.Tensor,
        arguments: torch.Tensor,
        mine: np.ndarray,
        cubic: np.ndarray,
    ) -> None:
        """Do ``kind`` to the pictures ``mine``, in place."""
        if kind in batch_ops.LEVELS:
            which = _index(mine, images.device)
            images[which] = batch_ops.LEVELS[kind](images[which], arguments[which])
            return
        fill = self.constant("fill", images.device)
        for smooth in (False, True):
            chosen = mine & (cubic == smooth)
            if chosen.any():
                which = _index(chosen, images.device)
                images[which] = batch_ops.GEOMETRY[kind](
                    images[which], arguments[which], smooth, fill
                )

    def _erase(self, values: torch.Tensor, plan: Plan) -> torch.Tensor:
        for k in range(plan.boxes.shape[1]):
            mine = np.flatnonzero(plan.boxes[:, k, 1] > plan.boxes[:, k, 0])
            if len(mine):
                fill = self._erase_on_host if values.device.type == "cpu" else self._erase_on_device
                fill(values, mine, plan.boxes[mine, k], plan.noise[mine, k])
        return values

    def _erase_on_host(
        self, values: torch.Tensor, mine: np.ndarray, boxes: np.ndarray, starts: np.ndarray
    ) -> None:
        size, mode, pixels = self.size, self.options.remode, values.numpy()
        noise = None if mode == "const" else self.constant("noise", values.device).numpy()
        places = zip(mine.tolist(), boxes.tolist(), starts.tolist(), strict=True)
        for i, (y0, y1, x0, x1), start in places:
            box = pixels[i, :, y0:y1, x0:x1]
            if noise is None:
                box[:] = 0
            elif mode == "rand":
                box[:] = noise[start : start + 3, None, None]
            else:
                own = noise[start : start + 3 * size**2].reshape(3, size, size)
                box[:] = own[:, y0:y1, x0:x1]

    def _erase_on_device(
        self, values: torch.Tensor, mine: np.ndarray, boxes: np.ndarray, starts: np.ndarray
    ) -> None:
        device, side = values.device, torch.arange(self.size, device=values.device)
        which, edges = (torch.from_numpy(x).to(device, non_blocking=True) for x in (mine, boxes))
        y0, y1, x0, x1 = edges[..., None].unbind(1)  # (n, 1)
        rows, columns = (side >= y0) & (side < y1), (side >= x0) & (side < x1)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (n, 1, S, S)
        values[which] = torch.where(inside, self._noise(starts, device), values[which])

    def _noise(self, starts: np.ndarray, device: torch.device) -> torch.Tensor:
        """What fills the boxes: (n, 3, S, S), (n, 3, 1, 1) or a zero."""
        mode = self.options.remode
        if mode == "const":
            return torch.zeros((), device=device)
        length = 3 if mode == "rand" else 3 * self.size**2
        begin = torch.from_numpy(starts).to(device, non_blocking=True)
        noise = self.constant("noise", device).unfold(0, length, 1)[begin]
        return (
            noise.view(-1, 3, 1, 1) if mode == "rand" else noise.view(-1, 3, self.size, self.size)
        )


def _between(share: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * share


def _index(mask: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of the pictures in ``mask``; the device isn't waited for."""
    return torch.from_numpy(np.flatnonzero(mask)).to(device, non_blocking=True)


def supports(options: "AugmentOptions") -> bool:
    """Whether all of a recipe's augmentation can be done on batches."""
    return options.ThreeAugment or options.aa is None or bool(ON_DEVICE.fullmatch(options.aa))


# --- uint8 pictures -----------------------------------------------------------------------------


def resize(image: torch.Tensor, size: Sequence[int], interpolation: str) -> torch.Tensor:
    """uint8 (3, H, W) to (3, *size), antialiased."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=tuple(size), mode=interpolation, antialias=True)[0]


def resize_short_side(image: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """uint8 (3, H, W) with a short side of ``size`` pixels; the long one as torchvision's."""
    height, width = image.shape[1:]
    long = int(size * max(height, width) / min(height, width))
    return resize(image, (size, long) if height <= width else (long, size), interpolation)
