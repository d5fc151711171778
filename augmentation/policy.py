"""Automatic augmentation by the batch: timm's policies drawn for all images at once."""

import math
import re
from typing import Any, Protocol

import numpy as np
from timm.data.auto_augment import AugmentOp, RandAugment
from torch import Tensor

from augmentation.draws import Draws
from augmentation.pixel_ops import GEOMETRY, LEVELS
from augmentation.preprocessing import Preprocessing
from augmentation.steps import TABLES, TablePolicy, build_policy, mean_colour

# Operations in the order of their numbers in a plan; 0 is no operation.
KINDS = ("none", *LEVELS, *GEOMETRY)
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


def kind_of(name: str) -> int:
    """The number in a plan of timm's operation ``name``."""
    return KINDS.index(_KIND_OF[_SUFFIX.sub("", name)])


def argument(
    name: str, level: np.ndarray, draws: Draws, size: tuple[int, int], hparams: dict[str, Any]
) -> np.ndarray:
    """The argument of timm's operation ``name`` at ``level`` (0 to 10, or above), (B,).

    ``size``: height and width of the images.
    """
    share, sign = level / 10, draws.sign()
    if name.startswith("Rotate"):
        return share * 30 * sign
    if name.startswith("Shear"):
        return share * 0.3 * sign
    if name.startswith("Translate"):
        # timm's Rel is a share of the side, its other a number of pixels.
        relative = name.endswith("Rel")
        reach = hparams.get("translate_pct", 0.45) * size[name.startswith("TranslateX")]
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


class PolicyDraws(Protocol):
    """What a policy does with each image of a batch."""

    @property
    def draws(self) -> int:
        """Random numbers per image, at most."""
        ...

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Kinds of operations, (B, L) int64 (0: none), and their arguments, (B, L) float32."""
        ...


def build_policy_draws(name: str, preprocessing: Preprocessing, interpolation: str) -> PolicyDraws:
    """The policy ``name``. Raises OptionError (``build_policy``) for one that doesn't exist."""
    if name in TABLES:
        return TableDraws(name, preprocessing)
    return Policy(name, preprocessing, interpolation)


class Policy:
    """What timm's automatic augmentation ``name`` would do, for a batch of images at once.

    O operations are known to the policy; each image gets L of them, one per layer.
    """

    def __init__(self, name: str, preprocessing: Preprocessing, interpolation: str) -> None:
        policy = build_policy(name, preprocessing, interpolation)
        self.size = preprocessing.size
        if isinstance(policy, RandAugment):
            self.ops: list[AugmentOp] = list(policy.ops)
            self.layers = policy.num_layers
            self.weights = policy.choice_weights
            self.rows = None
        else:
            self.ops = [op for row in policy.policy for op in row]
            self.layers = len(policy.policy[0])
            self.rows = np.arange(len(self.ops)).reshape(-1, self.layers)
        # (O,) each
        self.prob = np.array([op.prob for op in self.ops], dtype=np.float64)
        self.magnitude = np.array([op.magnitude for op in self.ops], dtype=np.float64)
        self.magnitude_std = np.array([op.magnitude_std for op in self.ops], dtype=np.float64)
        self.magnitude_max = np.array([op.magnitude_max or 10 for op in self.ops], dtype=np.float64)
        self.names = sorted({op.name for op in self.ops})
        self.name_of = np.array([self.names.index(op.name) for op in self.ops])

    @property
    def draws(self) -> int:
        """Random numbers per image, at most."""
        return 1 + len(self.ops) + self.layers * (4 + 2 * len(self.names))

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Kinds of operations, (B, L) int64 (0: none), and their arguments, (B, L) float32."""
        chosen = self._choose(draws)
        levels = self._levels(chosen, draws)
        names = self.name_of[chosen]
        kinds = np.zeros_like(names)
        arguments = np.zeros(names.shape)
        for layer in range(self.layers):
            # Every image draws for every name, so that its numbers don't depend on its batch.
            for number, name in enumerate(self.names):
                value = argument(name, levels[:, layer], draws, self.size, self.ops[0].hparams)
                named = names[:, layer] == number
                kinds[named, layer] = kind_of(name)
                arguments[named, layer] = value[named]
        applied = draws.uniform(self.layers) < self.prob[chosen]
        return np.where(applied, kinds, 0), arguments.astype(np.float32)

    def _levels(self, chosen: np.ndarray, draws: Draws) -> np.ndarray:
        """Magnitudes with their noise, (B, L): uniform below them where timm's std is infinite."""
        level, std = self.magnitude[chosen], self.magnitude_std[chosen]
        finite = np.where(np.isinf(std), 0.0, std)
        noisy = level + finite * draws.normal(self.layers)
        level = np.where(np.isinf(std), level * draws.uniform(self.layers), noisy)
        return np.clip(level, 0, self.magnitude_max[chosen])

    def _choose(self, draws: Draws) -> np.ndarray:
        """Indices of the operations, (B, L)."""
        if self.rows is not None:
            return self.rows[(draws.uniform() * len(self.rows)).astype(np.int64)]
        if self.weights is None:
            return (draws.uniform(self.layers) * len(self.ops)).astype(np.int64)
        # Weighted and without repetition (Efraimidis and Spirakis, 2006).
        with np.errstate(divide="ignore"):
            keys = np.log(draws.uniform(len(self.ops))) / np.maximum(self.weights, 1e-300)
        return np.argsort(-keys, axis=1)[:, : self.layers]


class TableDraws:
    """AutoAugment's policy for CIFAR-10 or SVHN: one of 25 pairs of operations for each image, with
    torchvision's magnitudes."""

    def __init__(self, name: str, preprocessing: Preprocessing) -> None:
        policy = TablePolicy(name, mean_colour(preprocessing), "bilinear")
        space = policy._augmentation_space(10, preprocessing.size)
        rows = [[_entry(*operation, space) for operation in row] for row in policy.policies]
        # (25, 2) each
        self.kinds, self.prob, self.arguments, self.signs, self.offsets = np.moveaxis(
            np.array(rows), 2, 0
        )

    @property
    def draws(self) -> int:
        """Random numbers per image."""
        return 5

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Kinds of operations, (B, 2) int64 (0: none), and their arguments, (B, 2) float32."""
        row = (draws.uniform() * len(self.kinds)).astype(np.int64)
        applied = draws.uniform(2) < self.prob[row]
        sign = np.where(self.signs[row] > 0, draws.sign(2), 1.0)
        arguments = self.offsets[row] + sign * self.arguments[row]
        kinds = np.where(applied, self.kinds[row], 0).astype(np.int64)
        return kinds, arguments.astype(np.float32)


def _entry(
    name: str, prob: float, magnitude: int | None, space: dict[str, tuple[Tensor, bool]]
) -> tuple[float, ...]:
    """Kind, probability, argument, whether that has a sign, and what it is added to."""
    levels, signed = space[name]
    level = float(levels[magnitude]) if magnitude is not None else 0.0
    if name.startswith("Translate"):
        level = int(level)  # whole pixels
    elif name == "Solarize":
        level = math.ceil(level)  # Pillow compares levels with it
    factor = _KIND_OF[name] in ("saturation", "contrast", "brightness", "sharpness")
    return kind_of(name), prob, level, signed, float(factor)
