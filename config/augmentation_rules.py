"""Rules between the options of augmentation, and between them and others."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from errors import OptionError

if TYPE_CHECKING:
    from config.config import Config
    from config.options import AugmentOptions

Errors = Iterator[OptionError]


def one_by_one(augment: "AugmentOptions") -> str:
    """The option, with its value, that takes one image at a time with Pillow; empty for none."""
    if augment.transform:
        return f"--transform {augment.transform}"
    if augment.albumentations:
        return "--albumentations"
    if not augment.ThreeAugment and (augment.aa or "").startswith(("augmix", "trivial")):
        return f"--aa {augment.aa}"
    return ""


def jitters(augment: "AugmentOptions") -> bool:
    """Whether colours are jittered: a policy takes the place of it, but for "3a"."""
    jitter = augment.color_jitter
    asked = any(jitter) if isinstance(jitter, tuple) else bool(jitter)
    policy = not augment.ThreeAugment and augment.aa is not None
    return asked and not (policy and not augment.aa.startswith("3a"))


def _repeated_augmentation(config: "Config") -> Errors:
    repeated = config.augment.repeated_aug
    if repeated and config.data.sampler != "shuffle":
        yield OptionError(
            "sampler",
            f"{config.data.sampler} draws every image on its own, repeated augmentation three "
            "times: add --no-repeated-aug",
        )
    if config.augment.resplit and not repeated and not config.augment.aug_splits:
        yield OptionError(
            "resplit",
            "means the copies of repeated augmentation: add --repeated-aug or leave it out",
        )


def _augmentation_device(config: "Config") -> Errors:
    augment = config.augment
    single = one_by_one(augment)
    if augment.augment_on == "device" and single:
        yield OptionError(
            "augment_on", f"{single} takes one image at a time: use cpu, or leave that out"
        )
    if config.data.cache != "device":
        return
    if augment.augment_on == "cpu" or single:
        yield OptionError(
            "cache", "device needs --augment-on device: images would come back one by one"
        )
    elif augment.aug_splits:
        yield OptionError("cache", "device gives each image once: use ram with --aug-splits")


def _three_augment(config: "Config") -> Errors:
    augment = config.augment
    if augment.ThreeAugment and augment.aa is not None and "aa" in config.explicit():
        yield OptionError("ThreeAugment", "takes the place of --aa: leave one out, or --aa none")


def _crops(config: "Config") -> Errors:
    mode = config.augment.train_crop_mode
    if config.augment.src and mode != "rrc":
        yield OptionError("src", f"contradicts --train-crop-mode {mode}: leave one out")


def _color_jitter(config: "Config") -> Errors:
    jitter = config.augment.color_jitter
    if not isinstance(jitter, tuple):
        return
    if len(jitter) == 2:
        yield OptionError("color_jitter", "takes one, three or four values, got 2")
    elif len(jitter) == 4 and jitter[3] > 0.5:
        yield OptionError("color_jitter", f"the hue must be at most 0.5, got {jitter[3]:g}")


def _splits(config: "Config") -> Errors:
    augment, loss = config.augment, config.loss
    if augment.aug_splits == 1:
        yield OptionError("aug_splits", "1 would leave the clean image alone: 2 or more, or 0")
    if loss.jsd_loss and not augment.aug_splits:
        yield OptionError("jsd_loss", "compares augmentation splits: add --aug-splits 3")
    mixes = augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None
    if augment.aug_splits and mixes and augment.mixup_prob > 0:
        yield OptionError(
            "aug_splits", "would be mixed with other images: add --mixup 0 --cutmix 0"
        )
    if not loss.jsd_loss:
        return
    if loss.bce_loss or loss.cosub or loss.loss not in ("auto", "ce"):
        yield OptionError(
            "jsd_loss", "goes with cross-entropy: leave out --loss, --bce-loss and --cosub"
        )
    if loss.distillation_type != "none":
        yield OptionError("jsd_loss", "can't be combined with --distillation-type: leave one out")
    if config.data.task == "multilabel":
        yield OptionError("jsd_loss", "is of one class per image: leave it out")


SUBJECTS = (
    _repeated_augmentation,
    _augmentation_device,
    _three_augment,
    _crops,
    _color_jitter,
    _splits,
)
