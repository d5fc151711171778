"""What a run has before it: how long it takes, and what trains better on few images."""

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from torch import nn

from architectures.factory import has_published_weights, published_cfg, resolve_name
from architectures.sizes import shortest, size_text
from augmentation.protocol import RGB, Form
from config import Config, by_name
from config.channel_rules import COLOUR_DEFAULTS, has_colours
from loggers import duration
from pipeline.bands import has_more_levels
from pipeline.dataset import ImageDataset
from pipeline.kept_pixels import sizes_of_some
from pipeline.limits import BadImageError
from pipeline.memory import probes, size_of
from pipeline.remote import is_remote
from pipeline.sources.base import FileSource, Source, Subset
from pipeline.sources.shards import ShardSource
from training.build import Parts, total_epochs
from training.data import Data, kept_side
from training.intervals import is_validated, validations
from training.train_sizes import relative_cost

log = logging.getLogger(__name__)

# CIFAR with its 50,000 images is the smallest set on which training from scratch is usual. On
# smaller ones it hardly reaches, at many times the cost, what fine-tuning gives at once (Steiner et
# al., arXiv 2106.10270, section 4.2).
FEW_IMAGES = 50_000
# Models for smaller images have no published weights that fit, and train in minutes.
SMALL_INPUT = 96
# The recipes of docs/finetune.md: images per class up to which each is the one.
_RECIPES = ((20, "frozen"), (200, "gradual"), (float("inf"), "layerwise"))
_RECIPE_MODEL, _RECIPE_SIZE, _RECIPE_BATCH = "deit_small_patch16_224", 224, 64
# Of a core, for a pixel of a JPEG file: 12 megapixels take 37 ms where the crop allows an eighth of
# the sides, 105 ms in full (measured with libjpeg-turbo).
SECONDS_SCALED, SECONDS_WHOLE = 37e-3 / 12e6, 105e-3 / 12e6
# Of a core, for an image that is kept: whatever its size, and what is added at a short side of 256
# pixels. Together they make the 3,300 images per second of BENCHMARKS.md.
KEPT_EACH, KEPT_PIXELS, KEPT_SIDE = 1.5e-4, 1.5e-4, 256
LARGE = 3  # times as fast
WORTH_SAYING = 600  # seconds
_EVERY = 4  # of the images that are probed, one in so many: a JPEG file is read whole
# Options that say which images, and where and how they are read.
_OF_THE_IMAGES = (
    *("data_set", "data_path", "inat_category", "val_fraction", "seed", "download"),
    *("image_root", "image_column", "label_column", "split_column", "background"),
    *("task", "label_columns", "label_separator"),
    *("on_bad_image", "num_workers", "shard_cache", "device", "plugin"),
)
_OF_LOADING = ("num_workers", "device")


def few_images(config: Config, train: ImageDataset, model: nn.Module, folder: Path) -> str:
    """What to say of a run that starts from nothing on few images; empty where it doesn't.

    Names the command that fine-tunes published weights on these images, beside ``folder``.
    """
    options = config.model
    trained = options.pretrained or options.finetune or config.run.overfit_batches
    if trained or len(train) >= FEW_IMAGES or min(options.size) < SMALL_INPUT:
        return ""
    own = has_published_weights(published_cfg(options.model))
    weights = "published weights" if own else f"the weights of {_RECIPE_MODEL}"
    return (
        f"{len(train)} images are few to train {options.model} from scratch; from {weights} it "
        "takes less time and is nearly always more accurate: "
        + finetuning_command(config, train, model, folder)
    )


def finetuning_command(config: Config, train: ImageDataset, model: nn.Module, folder: Path) -> str:
    """The command that fine-tunes published weights of the run's model on the run's images.

    Of a model without any, DeiT-S takes the place. ``folder`` is the run's: the new one lies
    beside it.
    """
    per_class = len(train) / max(1, len(train.classes))
    recipe = next(name for most, name in _RECIPES if per_class <= most)
    words = ["python", "main.py", "--config", f"configs/finetune_{recipe}.yaml"]
    words += _model_words(config, model, recipe)
    words += [*_image_words(config), *_form_words(config)]
    batch = config.data.batch_size
    batch = min(_RECIPE_BATCH, len(train), _RECIPE_BATCH if batch == "auto" else batch)
    if batch < _RECIPE_BATCH:
        words += _words("batch_size", batch)
    words += _words("output_dir", f"{folder}-finetuned")
    return shlex.join(words)


def _model_words(config: Config, model: nn.Module, recipe: str) -> list[str]:
    """``--model`` and what its form asks for, where it isn't the recipe's own."""
    name = config.model.model
    if resolve_name(name) == _RECIPE_MODEL or not has_published_weights(cfg := published_cfg(name)):
        return []
    words = _words("model", name)
    size = shortest(cfg["input_size"][1:])
    if size != _RECIPE_SIZE:
        words += _words("input_size", size)
    heads = cfg["classifier"]
    heads = [heads] if isinstance(heads, str) else list(heads)
    if recipe == "frozen" and heads != ["head"]:
        words += _words("unfreeze_at", [f"0:{head}" for head in heads])
    if recipe == "gradual" and not (heads == ["head"] and _has_twelve_blocks(model)):
        words += _words("unfreeze_at", [*(f"0:{head}" for head in heads), "5:*"])
    return words


def _has_twelve_blocks(model: nn.Module) -> bool:
    """Whether the stages of finetune_gradual.yaml are those of ``model``."""
    modules = dict(model.named_modules())
    return {"norm", "blocks.11"} <= modules.keys() and "blocks.12" not in modules


def _image_words(config: Config, *, without: Sequence[str] = ()) -> list[str]:
    """The options that say which images, as they were given."""
    explicit = config.explicit() - set(without)
    words = []
    for name in _OF_THE_IMAGES:
        if name in explicit:
            words += _words(name, getattr(getattr(config, by_name(name).section), name))
    return words


def _form_words(config: Config) -> list[str]:
    """The options that other images than three colours of 8 bits take, whatever the recipe says."""
    form = Form(config.model.in_chans, config.data.bit_depth)
    if form == RGB:
        return []
    words = _channel_words(form)
    for name in ("mean", "std"):
        if (values := getattr(config.data, name)) is not None:
            words += _words(name, values)
    if not has_colours(*form):
        for name in COLOUR_DEFAULTS:
            words += _words(name, "none")
    return words


def _channel_words(form: Form) -> list[str]:
    return _words("in_chans", form.channels) + _words("bit_depth", form.bit_depth)


def large_images(config: Config, data: Data, seconds: float | None = None) -> str:
    """What to say where images are so large that decoding them wastes time; empty elsewhere.

    Said where images that are kept small come LARGE times as fast or more, and all epochs decode
    for WORTH_SAYING seconds of a core or more. A few headers are read; bands are decoded.

    Args:
        config: of the run.
        data: its loaders show whether images are kept already.
        seconds: measured, of a core for one image; None: by the sizes of the images.
    """
    train, loader = data.train, data.train_loader
    form = Form(config.model.in_chans, config.data.bit_depth)
    if not _has_files_here(config, train) or loader.cached or config.run.overfit_batches:
        return ""
    side = kept_side(config) or max(config.model.size)
    sizes, measured = _sizes_and_seconds(train.source, form)
    if not sizes:
        return ""
    pixels = mean(width * height for width, height in sizes)
    seconds = seconds or measured
    if seconds is None:
        scaled = config.augment.jpeg_scaling == "on"
        seconds = pixels * (SECONDS_SCALED if scaled else SECONDS_WHOLE)
    for_pixels = KEPT_PIXELS * form.pixel_bytes / RGB.pixel_bytes
    kept = 1 / (KEPT_EACH + for_pixels * (side / KEPT_SIDE) ** 2)  # images per second
    whole = data.sampler.num_samples * config.run.epochs * seconds
    if kept * seconds < LARGE or whole < WORTH_SAYING:
        return ""
    areas = [w * h * min(1.0, side / min(w, h)) ** 2 for w, h in sizes]
    root = Path(config.data.data_path)
    folder = f"{root if root.name not in ('', '..') else root.resolve()}-packed"
    pack = ["python", "-m", "tools.data", "pack", *_image_words(config, without=_OF_LOADING)]
    pack += [] if form == RGB else _channel_words(form)
    pack += ["--short-side", str(side), "--output-dir", folder]
    width, height = (mean(size[i] for size in sizes) for i in range(2))
    crop = size_text(config.model.size)
    size = form.pixel_bytes * mean(areas) * len(train) / 1e9
    return (
        f"images are {width:.0f}×{height:.0f} on average, the crop is {crop}: "
        f"decoding takes about {1000 * seconds:.2g} ms each, {1 / seconds:.0f} images/s per core; "
        f"--cache disk (about {size:.2g} GB) or `{shlex.join(pack)}` "
        + (f"brings about {round(kept, -2):,.0f}" if form == RGB else "spares most of that")
    )


def _has_files_here(config: Config, train: ImageDataset) -> bool:
    """Whether images come from files of this machine, whose headers can be looked at."""
    inner = train.source
    while isinstance(inner, Subset):
        inner = inner.source
    return isinstance(inner, FileSource | ShardSource) and not is_remote(config.data.data_path)


def lost_levels(config: Config, train: ImageDataset) -> str:
    """What to say where images have more levels than are read of them; empty elsewhere.

    A few headers are read.
    """
    if config.data.bit_depth != RGB.bit_depth or not _has_files_here(config, train):
        return ""
    numbers = probes(train.source)[::_EVERY].tolist()
    try:
        deep = any(has_more_levels(train.source.open(number)) for number in numbers)
    except (BadImageError, OSError):  # whoever reads the image says it
        return ""
    if not deep:
        return ""
    return (
        "images of more than 8 bits per channel are read as 8: --bit-depth 16 keeps 16 "
        "(docs/images.md)"
    )


def _sizes_and_seconds(source: Source, form: Form) -> tuple[list[tuple[int, int]], float | None]:
    """Width and height of a few images, and seconds for one where they had to be decoded."""
    if form == RGB:
        sizes = [size_of(source.open(int(n))) for n in probes(source)[::_EVERY]]
        return [size for size in sizes if min(size) > 0], None
    began = time.process_time()
    sizes = [(width, height) for height, width in sizes_of_some(source, form)]
    return sizes, (time.process_time() - began) / max(len(sizes), 1)


def _words(name: str, value: object) -> list[str]:
    """An option on a command line."""
    flag = by_name(name).flag
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [flag, *map(str, values)]


class TimeToGo:
    """Says once how long a run will take, while its first epoch is still under way.

    The end of that epoch says it better, so nothing is said where it comes within a few seconds.
    """

    WAIT = 10.0  # seconds of updates, the first one not counted: the device isn't waited for

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._first: tuple[float, int, int] | None = None
        self._done = False

    def after_update(self) -> None:
        """To be called after each update."""
        progress, now = self.parts.state.progress, time.monotonic()
        if self._done:
            return
        if self._first is None or progress.update <= self._first[1]:  # after a rollback
            self._first = now, progress.update, progress.epoch
            return
        began, update, epoch = self._first
        if now - began < self.WAIT and progress.epoch == epoch:
            return
        self._done = True
        if progress.epoch == epoch:
            seconds = (now - began) / (progress.update - update)
            left = seconds_to_go(self.parts, seconds)
            frozen = self.parts.config.model.unfreeze_at
            more = "; more once --unfreeze-at frees more" if frozen else ""
            hours = self.parts.config.run.stop_after
            if hours and left > 3600 * hours:
                more += f"; --stop-after {hours:g} ends this session before"
            log.info("time     about %s to go, %.3g s per update%s", duration(left), seconds, more)


def seconds_to_go(parts: Parts, seconds: float) -> float:
    """Of the rest of a run whose updates take ``seconds`` each.

    An evaluation is taken to cost a third of training for an image: the forward pass alone.
    """
    config, data, progress = parts.config, parts.data, parts.state.progress
    epochs = min(total_epochs(config), config.run.stop_at_epoch or total_epochs(config))
    updates = data.updates_per_epoch(config)
    accumulated = config.optim.accum_steps
    left = _work(parts, progress.epoch, epochs) * updates
    now = relative_cost(parts, progress.epoch)
    left = left / now - progress.step / accumulated
    evaluations = validations(config, progress.epoch, epochs) / now
    return left * seconds + evaluations * _updates_of_evaluation(parts) * seconds


def rest_of_run(parts: Parts, seconds: float) -> float:
    """Seconds of the rest of a run whose last epoch took ``seconds``, its validation included if
    it had one."""
    config, done = parts.config, parts.state.progress.epoch
    end = total_epochs(config)
    training = parts.data.updates_per_epoch(config)
    evaluation = _updates_of_evaluation(parts)
    measured = training * relative_cost(parts, done - 1) + evaluation * is_validated(config, done)
    left = _work(parts, done, end) * training + validations(config, done, end) * evaluation
    return seconds * left / measured


def _work(parts: Parts, start: int, end: int) -> float:
    """Training from epoch ``start`` to ``end``, in epochs of images of evaluation's size."""
    return sum(relative_cost(parts, epoch) for epoch in range(start, end))


def _updates_of_evaluation(parts: Parts) -> float:
    """What a validation costs, the average's included, in updates."""
    loader, settings = parts.data.val_loader, parts.settings
    images = len(loader) * loader.batch_size * (2 if parts.state.ema else 1)
    return images / (3 * settings.batch_size * parts.config.optim.accum_steps)
