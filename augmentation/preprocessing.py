"""How an image becomes the model's input in evaluation: what checkpoints and exports carry."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from timm.data.config import resolve_data_config

from architectures.sizes import ImageSize, height_width, shortest
from augmentation.protocol import Form
from config import DROP, background_colour
from errors import CheckpointError, first_names

_NOTE = "background: "
_DEPTH = "bit depth: "
SMALL = 32  # inputs up to this many pixels are cropped as CIFAR images are (DeiT)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input in evaluation; checkpoints carry it."""

    input_size: ImageSize
    """In pixels: the side of a square, or height and width; a square of two is made one number."""
    crop_ratio: float
    """Share of the resized image that is kept, in length."""
    interpolation: str
    """One of Pillow's filters by name: "bicubic", "bilinear" …"""
    mean: tuple[float, ...]
    """A value for each channel, of images in 0–1."""
    std: tuple[float, ...]
    """A value for each channel."""
    crop_mode: str = "center"
    """What is resized to input_size / crop_ratio before the centre is cut out: "center", the short
    side; "squash", both sides; "border", the long side, with the mean colour around it. For height
    and width that differ, "center" resizes just around both, and "border" just within them."""
    background: str = "white"
    """What transparent images are composited on: a colour by name or as #rrggbb; "drop": their
    colours are taken as they are, as timm does."""
    bit_depth: int = 8
    """8 or 16 bits of each pixel and channel: 255 or 65535 becomes 1."""

    def __post_init__(self) -> None:
        """Raises OptionError for a background that is none."""
        background_colour(self.background)
        object.__setattr__(self, "input_size", shortest(self.input_size))

    @property
    def channels(self) -> int:
        """Of the images: three colours, one grey, or bands."""
        return len(self.mean)

    @property
    def form(self) -> Form:
        """What is decoded."""
        return Form(self.channels, self.bit_depth)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return height_width(self.input_size)

    @property
    def is_small(self) -> bool:
        """Whether training crops such images as CIFAR's: none of their sides is longer than 32."""
        return max(self.size) <= SMALL

    @property
    def resized_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that ``crop_mode`` brings images to."""
        height, width = self.size
        return int(height / self.crop_ratio), int(width / self.crop_ratio)

    @property
    def border(self) -> tuple[int, ...]:
        """The levels around an image that is smaller than what is cut out, a value for each
        channel."""
        if self.crop_mode == "border":
            return tuple(round(self.form.levels * value) for value in self.mean)
        return (0,) * self.channels

    def steps(self) -> list[dict[str, Any]]:
        """What is done to an image, one step after the other, in plain values; docs/export.md has
        what each means."""
        height, width = self.size
        colour = background_colour(self.background)
        return [
            {
                "step": "decode",
                **self._decoded(),
                "exif_orientation": True,
                "background": None if colour is None else list(colour),
            },
            {
                "step": "resize",
                **self._resize(),
                "interpolation": self.interpolation,
                "antialias": self.interpolation != "nearest",
            },
            {
                "step": "crop",
                "width": width,
                "height": height,
                "position": "center",
                "fill": list(self.border),
            },
            {"step": "scale", "from": [0, self.form.levels], "to": [0.0, 1.0], "dtype": "float32"},
            {"step": "normalize", "mean": list(self.mean), "std": list(self.std)},
            {"step": "layout", "axes": "NCHW"},
        ]

    def _resize(self) -> dict[str, Any]:
        """What width and height an image is resized to, as numbers or how to work them out."""
        height, width = self.resized_size
        if self.crop_mode == "squash":
            return {"width": width, "height": height}
        if height == width and self.crop_mode == "center":
            return {"short_side": width, "long_side": "floor(short_side * long / short)"}
        if height == width:
            return {"long_side": width, "short_side": "max(1, round(long_side * short / long))"}
        ratio = f"(width / {width}, height / {height})"
        if self.crop_mode == "center":
            return {side: f"round({side} / min{ratio})" for side in ("width", "height")}
        return {side: f"max(1, round({side} / max{ratio}))" for side in ("width", "height")}

    def _decoded(self) -> dict[str, Any]:
        channels = {1: "L", 3: "RGB"}.get(self.channels, self.channels)
        return {"channels": channels} | ({} if self.bit_depth == 8 else {"bit_depth": 16})

    def to_dict(self) -> dict[str, Any]:
        """As primitives, for a checkpoint."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if (name, value) != ("bit_depth", 8)  # so that older versions read it
        }

    def exported(self) -> dict[str, Any]:
        """As primitives, for files that others read: with the steps."""
        return {**self.to_dict(), "steps": self.steps()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of ``to_dict``.

        Checkpoints without a crop mode hold a crop ratio for small inputs that was never used;
        those without a background dropped transparency. The steps that exported files have are
        left out. Raises CheckpointError for fields that aren't known here.
        """
        values = {"background": DROP, **values}
        values.pop("steps", None)
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise CheckpointError(
                f"its preprocessing has {first_names(sorted(unknown))}, which this version doesn't "
                "know: take the version that wrote it"
            )
        found = cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        if "crop_mode" not in values and found.is_small:
            return replace(found, crop_ratio=1.0)
        return found

    @classmethod
    def of_model(cls, cfg: Mapping[str, Any]) -> "Preprocessing":
        """What a model's ``pretrained_cfg`` asks for, read as timm's ``resolve_data_config`` does.

        A mean or std of another number of values than the model has channels is averaged.
        """
        found = resolve_data_config(pretrained_cfg=dict(cfg))
        channels, height, width = found["input_size"]
        return cls(
            input_size=(height, width),
            crop_ratio=found["crop_pct"],
            interpolation=found["interpolation"],
            mean=per_channel(found["mean"], channels),
            std=per_channel(found["std"], channels),
            crop_mode=found["crop_mode"],
            background=_noted(cfg, _NOTE) or cls.background,
            bit_depth=int(_noted(cfg, _DEPTH) or cls.bit_depth),
        )

    def notes(self) -> list[str]:
        """What timm's ``pretrained_cfg`` has no field for, as its ``notes``."""
        depth = [] if self.bit_depth == 8 else [f"{_DEPTH}{self.bit_depth}"]
        return [_NOTE + self.background, *depth]


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A value for each channel: one for all, else those there are or, of another number, their
    average, as timm's loader has it."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _noted(cfg: Mapping[str, Any], name: str) -> str:
    notes = (note for note in cfg.get("notes") or () if note.startswith(name))
    return next(notes, "").removeprefix(name)
