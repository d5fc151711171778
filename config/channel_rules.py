"""``--in-chans`` and ``--bit-depth``: what is left out, and what is refused, for other images than
three colours of 8 bits."""

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from config.augmentation_rules import jitters, one_by_one
from errors import OptionError

if TYPE_CHECKING:
    from config.config import Config

IN_CHANS = "--in-chans"
"""The origin of options that a model of other images is to have."""
BIT_DEPTHS = (8, 16)
# Of colours, and on unless something else is said.
COLOUR_DEFAULTS = ("aa", "color_jitter")
_INSTEAD = "use --scale, --hflip, --vflip, --rotate, --perspective, --blur-prob, --reprob, --mixup"


def has_colours(in_chans: int, bit_depth: int) -> bool:
    """Whether images can have what is done to colours: greys and three colours, of 8 bits."""
    return in_chans in (1, 3) and bit_depth == 8


def leave_out_colours(values: MutableMapping[str, Any], origin: MutableMapping[str, str]) -> None:
    """Turn off what is done to colours where images have none, and nobody asked for it."""
    try:
        form = int(values.get("in_chans", 3)), int(values.get("bit_depth", 8))
    except (TypeError, ValueError):
        return  # whoever reads the options says it
    if has_colours(*form):
        return
    for name in COLOUR_DEFAULTS:
        if name not in origin:
            values[name], origin[name] = None, IN_CHANS


def _form(config: "Config") -> Iterator[OptionError]:
    channels, depth = config.model.in_chans, config.data.bit_depth
    if depth not in BIT_DEPTHS:
        yield OptionError("bit_depth", f"must be 8 or 16, got {depth}")
    if (channels, depth) == (3, 8):
        return
    what = _named(config)
    augment = config.augment
    if single := one_by_one(augment):
        yield OptionError(
            "augment_on", f"{single} takes colours of 8 bits, not {what}: leave it out"
        )
    if channels == 1:
        hue = augment.color_jitter
        if jitters(augment) and isinstance(hue, tuple) and len(hue) == 4 and hue[3] > 0:
            yield OptionError("color_jitter", "greys have no hue: give one or three values")
        if augment.grayscale_prob > 0:
            yield OptionError("grayscale_prob", "the images are grey: leave it out")
    if not has_colours(channels, depth):
        for name in _of_colours(config):
            yield OptionError(name, f"is for colours of 8 bits, not for {what}: {_INSTEAD}")


def _named(config: "Config") -> str:
    channels, depth = config.model.in_chans, config.data.bit_depth
    return f"images of --in-chans {channels}" + (f" --bit-depth {depth}" if depth != 8 else "")


def _of_colours(config: "Config") -> Iterator[str]:
    """The options that are on and need colours of 8 bits."""
    augment = config.augment
    if augment.ThreeAugment:
        yield "ThreeAugment"
    elif augment.aa is not None:
        yield "aa"
    if jitters(augment):
        yield "color_jitter"
    if augment.grayscale_prob > 0:
        yield "grayscale_prob"


def _normalisation(config: "Config") -> Iterator[OptionError]:
    channels = config.model.in_chans
    several = {3: "three"}.get(channels, channels)
    for name, value in (("mean", config.data.mean), ("std", config.data.std)):
        if value is not None and len(value) not in (1, channels):
            count = "one value" if channels == 1 else f"one or {several} values"
            yield OptionError(name, f"takes {count}, got {len(value)}")


SUBJECTS = (_form, _normalisation)
