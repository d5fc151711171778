"""How an image becomes the model's input in evaluation: what checkpoints and exports carry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from timm.data.config import resolve_data_config

from config import DROP, background_colour
from errors import CheckpointError, OptionError

_NOTE = "background: "
SMALL = 32  # inputs up to this many pixels are cropped as CIFAR images are (DeiT)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input in evaluation; checkpoints carry it."""

    input_size: int
    """Height and width in pixels."""
    crop_ratio: float
    """Share of the resized image that is kept, in length."""
    interpolation: str
    """One of Pillow's filters by name: "bicubic", "bilinear" …"""
    mean: tuple[float, ...]
    """Three values, of images in 0–1."""
    std: tuple[float, ...]
    """Three values."""
    crop_mode: str = "center"
    """What is resized to input_size / crop_ratio before the centre is cut out: "center", the short
    side; "squash", both sides; "border", the long side, with the mean colour around it."""
    background: str = "white"
    """What transparent images are composited on: a colour by name or as #rrggbb; "drop": their
    colours are taken as they are, as timm does."""

    def __post_init__(self) -> None:
        """Raises OptionError for a background that is none."""
        background_colour(self.background)

    @property
    def resized_side(self) -> int:
        """Pixels of the side that ``crop_mode`` resizes."""
        return int(self.input_size / self.crop_ratio)

    @property
    def border(self) -> tuple[int, ...]:
        """The colour around an image that is smaller than what is cut out, 0–255."""
        if self.crop_mode == "border":
            return tuple(round(255 * value) for value in self.mean)
        return 0, 0, 0

    def steps(self) -> list[dict[str, Any]]:
        """What is done to an image, one step after the other, in plain values; docs/export.md has
        what each means."""
        side = self.resized_side
        resize = {
            "center": {"short_side": side, "long_side": "floor(short_side * long / short)"},
            "squash": {"width": side, "height": side},
            "border": {"long_side": side, "short_side": "max(1, round(long_side * short / long))"},
        }[self.crop_mode]
        colour = background_colour(self.background)
        return [
            {
                "step": "decode",
                "channels": "RGB",
                "exif_orientation": True,
                "background": None if colour is None else list(colour),
            },
            {
                "step": "resize",
                **resize,
                "interpolation": self.interpolation,
                "antialias": self.interpolation != "nearest",
            },
            {
                "step": "crop",
                "width": self.input_size,
                "height": self.input_size,
                "position": "center",
                "fill": list(self.border),
            },
            {"step": "scale", "from": [0, 255], "to": [0.0, 1.0], "dtype": "float32"},
            {"step": "normalize", "mean": list(self.mean), "std": list(self.std)},
            {"step": "layout", "axes": "NCHW"},
        ]

    def to_dict(self) -> dict[str, Any]:
        """As primitives, for a checkpoint."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

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
                f"its preprocessing has {', '.join(sorted(unknown))}, which this version doesn't "
                "know: take the version that wrote it"
            )
        if "crop_mode" not in values and values["input_size"] <= SMALL:
            values = {**values, "crop_ratio": 1.0}
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    @classmethod
    def of_model(cls, cfg: Mapping[str, Any]) -> "Preprocessing":
        """What a model's ``pretrained_cfg`` asks for, read as timm's ``resolve_data_config`` does.

        Raises OptionError for images that are not square or have not three colours.
        """
        found = resolve_data_config(pretrained_cfg=dict(cfg))
        channels, height, width = found["input_size"]
        if channels != 3 or height != width:
            raise OptionError(
                "model",
                f"{cfg.get('architecture') or 'it'} takes {channels} × {height} × {width} images, "
                "only square ones of three colours are supported: choose another",
            )
        return cls(
            input_size=height,
            crop_ratio=found["crop_pct"],
            interpolation=found["interpolation"],
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            crop_mode=found["crop_mode"],
            background=next(
                (n.removeprefix(_NOTE) for n in cfg.get("notes") or () if n.startswith(_NOTE)),
                cls.background,
            ),
        )

    def notes(self) -> list[str]:
        """What timm's ``pretrained_cfg`` has no field for, as its ``notes``."""
        return [_NOTE + self.background]
