"""Every option, written down once: name, type, default, range, help and section.

The command-line parser, the YAML check, ``--help``, the saved ``config.yaml`` and
``docs/options.md`` are all made from the dataclasses below. Nothing here imports torch, so
``--help`` answers at once.

Precedence, lowest first: default, ``base:`` of a config file, the config file, the command line.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from errors import OptionError, UserError

# Those that treat each element of a weight by itself, or take norms that sharded tensors have too.
FSDP_OPTIMIZERS = ("adamw", "adam", "nadamw", "sgd", "momentum", "lamb", "lion")
DEFAULT = "default"
COMMAND_LINE = "command line"
CHECKPOINT = "checkpoint"
# ``int | None`` is the one, ``int | Literal["auto"]`` the other.
_UNIONS = (types.UnionType, typing.Union)


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    length: tuple[int, int] | None = None,
    aliases: tuple[str, ...] = (),
    transient: bool = False,
) -> Any:
    """A dataclass field that is an option.

    ``low``/``high`` are inclusive bounds, ``above``/``below`` exclusive ones (of each element of a
    tuple), ``length`` the least and greatest number of elements. A ``transient`` option says what
    to do this time and is not part of the recipe, so the saved config leaves it out.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below, "length": length}
    return dataclasses.field(
        default=default,
        metadata={"help": help, "aliases": aliases, "transient": transient, **bounds},
    )


@dataclass(frozen=True)
class RunOptions:
    """What to do"""

    config: str = option(
        "", "YAML file with options; the command line overrides it", transient=True
    )
    print_config: bool = option(
        False, "print the resolved options and where each came from, then exit", transient=True
    )
    output_dir: str = option(
        "", "where the run is written (default: output/MODEL-DATASET)", transient=True
    )
    resume: str = option(
        "",
        "checkpoint file or URL to go on from, or 'auto': the newest good one of the run's folder",
        transient=True,
    )
    start_epoch: int = option(
        0, "count epochs from here; with --resume, instead of the checkpoint's count", low=0,
        transient=True,
    )  # fmt: skip
    eval: bool = option(False, "evaluate the model of --resume and exit", transient=True)
    epochs: int = option(300, "number of epochs", low=1)
    stop_at_epoch: int | None = option(
        None,
        "end this session after that many epochs; --resume goes on later",
        low=1,
        transient=True,
    )
    device: str = option("auto", "auto (cuda, else cpu), cpu, cuda, cuda:N or mps")
    seed: int = option(0, "seed of everything random", low=0, high=2**32 - 1)
    deterministic: bool = option(
        False, "use only deterministic algorithms (CUDA: slower; on CPU runs repeat without it)"
    )
    plugin: tuple[str, ...] = option(
        (), "Python files or modules to import first: they may register models and data sets"
    )
    overfit_batches: int = option(
        0,
        "sanity run: train and evaluate on the same N batches with the evaluation transform, "
        "without mixing, dropout or smoothing; the loss must reach zero",
        low=0,
    )


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model: str = option("deit_base_patch16_224", "name: deit_small, cait_S24_224, any timm model …")
    pretrained: bool = option(False, "start from timm's published weights")
    finetune: str = option(
        "", "checkpoint file or https URL to start from, matched by name and shape"
    )
    input_size: int = option(224, "height and width of the pictures the model sees, pixels", low=1)
    drop: float = option(0.0, "dropout rate", low=0, below=1)
    drop_path: float = option(0.1, "stochastic depth rate", low=0, below=1)
    drop_block: float | None = option(None, "DropBlock rate (CNNs)", low=0, below=1)
    attn_only: bool = option(False, "train only attention, head and position embedding")
    freeze: tuple[str, ...] = option(
        (), "patterns of parameter names to keep fixed, e.g. 'blocks.*' or '*' with --unfreeze-at"
    )
    unfreeze_at: tuple[str, ...] = option(
        (), "EPOCH:PATTERN, train those parameters from that epoch on (counted from 0)"
    )
    grad_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory"
    )
    channels_last: bool | None = option(
        None, "channels-last memory layout (default: for CNNs, unless --fsdp)"
    )
    compile: bool = option(False, "torch.compile the model")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default",
        "torch.compile: reduce-overhead and max-autotune record CUDA graphs, for small models",
    )
    talking_heads: Literal["auto", "plain", "lean", "fused"] = option(
        "auto",
        "CaiT: how attention is computed, with the same result: fused in a Triton kernel (A100, "
        "H100, H200, half precision), lean (recomputed in the backward pass), plain, or the best "
        "of these that is possible",
    )


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: str = option(
        "", "folder (or CSV file) of the data set; of wds/ also an https, s3, gs … address"
    )
    data_set: str = option(
        "IMNET",
        "IMNET (folders train/ and val/, one subfolder a class), CIFAR10, CIFAR100 (or CIFAR), "
        "MNIST, FMNIST, INAT, INAT19, CSV, DIGITS (bundled), or one of timm's readers: "
        "wds/NAME, hfds/NAME, tfds/NAME",
    )
    inat_category: Literal[
        "kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"
    ] = option("name", "iNaturalist: the level that is the class")
    val_fraction: float | None = option(
        None,
        "hold out this share of each class where the set has no validation part",
        above=0,
        below=1,
    )
    download: bool = option(False, "fetch the data set if it isn't there (CIFAR, MNIST, FMNIST)")
    on_bad_image: Literal["error", "skip"] = option(
        "error", "a picture that can't be read: stop and name it, or take another and list it"
    )
    batch_size: int | Literal["auto"] = option(
        64,
        "pictures a step and process; auto: as many as fit the device, with accumulation up to "
        "--effective-batch",
        low=1,
    )
    effective_batch: int = option(
        1024, "pictures of an update, all processes together, with --batch-size auto", low=1
    )
    eval_batch_size: int | None = option(
        None, "pictures a step and process in evaluation (default: 1.5 × batch-size)", low=1
    )
    num_workers: int | Literal["auto"] = option(
        "auto", "loader processes (auto: one a core and training process, at most 10)", low=0
    )
    loader_timeout: float = option(
        300,
        "seconds for a batch, after which the picture that a loader process hangs at is treated as "
        "--on-bad-image says; 0: no limit",
        low=0,
    )
    pin_mem: bool = option(True, "pinned host memory for faster copies to CUDA")
    shard_cache: str = option(
        "", "folder for copies of remote shards (default: in the system's temporary folder)",
        transient=True,
    )  # fmt: skip
    shard_cache_gb: float = option(
        50, "10⁹ bytes that copies of remote shards may take; those longest unused go", above=0
    )
    cache: Literal["auto", "none", "ram", "device"] = option(
        "auto",
        "keep decoded pictures in host memory or on the device (auto: small pictures of one size); "
        "no pixel changes by it",
    )
    sampler: Literal["shuffle", "balanced"] = option(
        "shuffle",
        "order of training: every picture once, or drawn so that classes are equally likely",
    )
    eval_crop_ratio: float = option(0.875, "evaluation: share of the picture kept", above=0, high=1)
    mean: tuple[float, ...] | None = option(
        None, "normalisation mean, one or three values in 0–1 (default: the model's or data set's)",
        low=0,
        high=1,
        length=(1, 3),
    )  # fmt: skip
    std: tuple[float, ...] | None = option(
        None, "normalisation deviation, likewise", above=0, length=(1, 3)
    )


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation"""

    color_jitter: float | None = option(0.3, "brightness, contrast and saturation jitter", low=0)
    aa: str | None = option(
        "rand-m9-mstd0.5-inc1",
        "automatic augmentation: a timm policy (rand-…, augmix-…, original, v0), trivial, or none",
    )
    train_interpolation: Literal["random", "bilinear", "bicubic"] = option(
        "bicubic", "resizing of training pictures"
    )
    augment_on: Literal["auto", "cpu", "device"] = option(
        "auto",
        "where training pictures are augmented: cpu, one by one with Pillow; device, by the batch "
        "(auto, but for --aa augmix and trivial)",
    )
    repeated_aug: bool = option(True, "repeated augmentation: three differing copies of a picture")
    train_mode: bool = option(True, "--no-train-mode trains in evaluation mode (no dropout)")
    ThreeAugment: bool = option(
        False,
        "DeiT III's 3-Augment (grey, solarise or blur) in place of --aa",
        aliases=("three-augment",),
    )
    src: bool = option(False, "simple random crop in place of the random resized crop")
    scale: tuple[float, ...] = option(
        (0.08, 1.0), "random resized crop: least and greatest share of the area", above=0, high=1,
        length=(2, 2),
    )  # fmt: skip
    ratio: tuple[float, ...] = option(
        (0.75, 4 / 3),
        "random resized crop: least and greatest width/height",
        above=0,
        length=(2, 2),
    )
    hflip: float = option(0.5, "chance of a horizontal flip", low=0, high=1)
    vflip: float = option(0.0, "chance of a vertical flip", low=0, high=1)
    reprob: float = option(0.25, "chance of random erasing", low=0, high=1)
    remode: Literal["pixel", "rand", "const"] = option("pixel", "what random erasing fills in")
    recount: int = option(1, "most rectangles erased in a picture", low=1)
    resplit: bool = option(False, "leave the first copy of repeated augmentation unerased")
    mixup: float = option(0.8, "mixup alpha; 0 turns it off", low=0)
    cutmix: float = option(1.0, "cutmix alpha; 0 turns it off", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(
        None, "cutmix: least and greatest side as a share of the picture (replaces alpha)",
        low=0, high=1, length=(2, 2),
    )  # fmt: skip
    mixup_prob: float = option(1.0, "chance that a batch is mixed at all", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "chance of cutmix where both are on", low=0, high=1)
    mixup_mode: Literal["batch", "pair", "elem"] = option(
        "batch", "one draw a batch, a pair or a picture"
    )


@dataclass(frozen=True)
class LossOptions:
    """Loss and distillation"""

    loss: Literal["auto", "ce", "bce", "focal", "quality-focal"] = option(
        "auto", "auto: cross-entropy, or BCE with --bce-loss or --cosub"
    )
    bce_loss: bool = option(
        False, "DeiT III's binary cross-entropy: every class of a mixed picture is a full 1"
    )
    smoothing: float = option(0.1, "label smoothing", low=0, below=1)
    focal_gamma: float = option(2.0, "focusing exponent of the focal losses", low=0)
    class_weights: Literal["none", "balanced"] = option(
        "none", "weigh the loss of a class by the inverse of its frequency"
    )
    cosub: bool = option(False, "cosub: two submodels by stochastic depth teach each other")
    teacher_model: str = option("regnety_160", "distillation: name of the teacher")
    teacher_path: str = option(
        "", "distillation: checkpoint or https URL of the teacher, or 'timm' for timm's weights"
    )
    distillation_type: Literal["none", "soft", "hard"] = option("none", "what the teacher gives")
    distillation_alpha: float = option(0.5, "share of the teacher in the loss", low=0, high=1)
    distillation_tau: float = option(1.0, "temperature of soft distillation", above=0)


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation"""

    opt: str = option("adamw", "optimiser: any of timm's (adamw, sgd, lamb, lion, muon …)")
    opt_eps: float | None = option(1e-8, "optimiser epsilon", above=0)
    opt_betas: tuple[float, ...] | None = option(
        None, "optimiser betas", low=0, below=1, length=(1, 3)
    )
    momentum: float = option(0.9, "momentum (SGD and its kin)", low=0, below=1)
    weight_decay: float = option(
        0.05, "weight decay; biases, norms and embeddings have none", low=0
    )
    clip_grad: float | None = option(None, "limit of the gradient; see --clip-mode", above=0)
    clip_mode: Literal["norm", "value", "agc"] = option(
        "norm", "limit the global norm, each value, or each unit against its weight (AGC)"
    )
    lr: float = option(5e-4, "learning rate for an effective batch of 512", low=0)
    unscale_lr: bool = option(False, "take --lr as it is, without scaling by effective batch / 512")
    layer_decay: float | None = option(
        None, "learning rate factor from each layer to the one below", above=0, high=1
    )
    head_lr_scale: float = option(1.0, "learning rate factor of the classifier head", above=0)
    accum_steps: int = option(1, "batches whose gradients make one optimiser step", low=1)
    amp: Literal["auto", "bf16", "fp16", "off"] = option(
        "auto", "mixed precision (auto: bf16 or else fp16 on CUDA, off on CPU)"
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop",
        "a loss or gradient that isn't finite: stop and say where, skip the step, or go back to "
        "the last checkpoint with half the learning rate",
    )
    rollback_fp32_steps: int = option(
        0,
        "after a rollback, make so many updates in full precision, with the whole learning rate",
        low=0,
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning-rate schedule (stepped every update)"""

    sched: Literal[
        "cosine", "cosine-restarts", "step", "multistep", "plateau", "onecycle", "poly", "constant"
    ] = option("cosine", "schedule, after a linear warm-up")
    lr_noise: tuple[float, ...] | None = option(
        None, "share of the epochs from which (to which) the learning rate is noisy",
        low=0, high=1, length=(1, 2),
    )  # fmt: skip
    lr_noise_pct: float = option(
        0.67, "greatest noise, as a share of the learning rate", above=0, high=1
    )
    lr_noise_std: float = option(1.0, "deviation of the noise", low=0)
    warmup_lr: float = option(1e-6, "learning rate of the first step", low=0)
    min_lr: float = option(
        1e-5, "learning rate at the end of cosine, one-cycle and poly, lowest of plateau", low=0
    )
    warmup_epochs: float = option(5, "length of the warm-up", low=0)
    cooldown_epochs: int = option(0, "epochs at the end rate, after --epochs", low=0)
    decay_epochs: float = option(30, "step: epochs between decays", above=0)
    decay_milestones: tuple[float, ...] = option((), "multistep: epochs of the decays", above=0)
    decay_rate: float = option(0.1, "step, multistep, plateau: factor of a decay", above=0, high=1)
    patience_epochs: int = option(10, "plateau: epochs without progress before a decay", low=0)
    restart_epochs: float | None = option(
        None,
        "cosine-restarts: length of the first cycle (default: a quarter of the epochs)",
        above=0,
    )
    restart_mul: float = option(
        1.0, "cosine-restarts: factor from one cycle's length to the next", low=1
    )
    restart_decay: float = option(
        1.0, "cosine-restarts: factor of the peak at a restart", above=0, high=1
    )
    poly_power: float = option(0.9, "poly: exponent", above=0)


@dataclass(frozen=True)
class EmaOptions:
    """Moving average of the weights"""

    model_ema: bool = option(True, "keep an exponential moving average; it is evaluated too")
    model_ema_decay: float = option(0.99996, "decay a step", low=0, below=1)
    model_ema_warmup: bool = option(
        True,
        "start with a shorter average, decay (1 + step) / (10 + step), so that short runs gain too",
    )
    model_ema_force_cpu: bool = option(False, "keep the average in host memory")


@dataclass(frozen=True)
class SaveOptions:
    """Checkpoints and stopping"""

    save_every: int = option(1, "epochs between checkpoints", low=1)
    save_every_steps: int = option(0, "updates between checkpoints within an epoch; 0: none", low=0)
    save_every_minutes: float = option(
        0.0, "minutes between checkpoints within an epoch; 0: none", low=0
    )
    keep: int = option(2, "newest checkpoints kept, beside the best", low=1)
    best_metric: str = option(
        "test_acc1",
        "log key that decides which checkpoint is best (…loss: lower is better)",
        aliases=("monitor",),
    )
    early_stop: int = option(
        0, "stop after so many epochs without progress of --best-metric; 0: never", low=0
    )
    early_stop_delta: float = option(0.0, "smallest change that is progress", low=0)


@dataclass(frozen=True)
class LogOptions:
    """Logs"""

    print_epoch: int = option(1, "epochs between printed summaries", low=1)
    log_interval: int = option(50, "steps between reads of the loss from the device", low=1)
    tensorboard: bool = option(True, "write TensorBoard files")
    tb_histograms: bool = option(
        False, "TensorBoard: histograms of weights and gradients each epoch"
    )
    tb_graph: bool = option(False, "TensorBoard: graph of the model")


@dataclass(frozen=True)
class DistOptions:
    """Several processes"""

    distributed: bool = option(False, "insist on several processes: an error without a launcher")
    world_size: int = option(1, "number of processes, for a --dist-url that isn't env://", low=1)
    dist_url: str = option(
        "env://", "where the processes meet: env://, file://PATH or tcp://HOST:PORT"
    )
    dist_eval: bool = option(True, "share evaluation out; the result is the same to the last digit")
    dist_timeout: int = option(600, "seconds after which a silent process is given up", low=1)
    dist_start_timeout: int = option(
        50, "seconds in which all processes must have started", low=1, transient=True
    )
    fsdp: bool = option(
        False,
        "spread weights, gradients and optimiser over the processes (FSDP2), for models that don't "
        "fit one card; checkpoints are folders, see docs/cluster.md",
    )
    sync_bn: bool = option(False, "batch norm over the pictures of all processes together")


@dataclass(frozen=True)
class Config:
    """The resolved options, by section, with the origin of each."""

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    augment: AugmentOptions
    loss: LossOptions
    optim: OptimOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    save: SaveOptions
    log: LogOptions
    dist: DistOptions
    origin: Mapping[str, str]

    def flat(self) -> dict[str, Any]:
        """Every option by name, as plain YAML/JSON values."""
        return {
            opt.name: _plain(getattr(getattr(self, opt.section), opt.name)) for opt in options()
        }

    def recipe(self) -> dict[str, Any]:
        """The options that make the run what it is: all but the transient ones."""
        return {name: value for name, value in self.flat().items() if not by_name(name).transient}

    def explicit(self) -> frozenset[str]:
        """Names of the options that somebody set to something else than the default.

        A saved config spells out the defaults, which doesn't make them anybody's wish.
        """
        return frozenset(
            opt.name
            for opt in options()
            if self.origin[opt.name] != DEFAULT
            and getattr(getattr(self, opt.section), opt.name) != opt.default
        )

    def replace(self, origin: str, **values: Any) -> "Config":
        """A copy with the named options changed."""
        return from_flat(
            {**self.flat(), **values}, {**self.origin, **dict.fromkeys(values, origin)}
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Option:
    """One option as the parser, the YAML check, the help and the docs see it."""

    name: str
    section: str
    title: str
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    transient: bool
    bounds: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def type_name(self) -> str:
        """The type as a person reads it, e.g. ``float``, ``error|skip`` or ``int|auto``."""
        return "|".join(_type_names(self.type))


def _type_names(tp: Any) -> list[str]:
    origin = typing.get_origin(tp)
    if origin is Literal:
        return [str(a) for a in typing.get_args(tp)]
    if origin in _UNIONS:
        return [n for a in typing.get_args(tp) for n in _type_names(a)]
    if origin is tuple:
        return [f"{n} …" for n in _type_names(typing.get_args(tp)[0])]
    return ["none" if tp is types.NoneType else tp.__name__]


@cache
def options() -> tuple[Option, ...]:
    """All options of a run, in the order of the help."""
    sections = [f for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]
    return tuple(opt for f in sections for opt in options_of(f.type, f.name))


def options_of(kind: type, section: str) -> tuple[Option, ...]:
    """The options of one section, a dataclass whose docstring is its title."""
    hints = typing.get_type_hints(kind)
    found = []
    for f in dataclasses.fields(kind):
        meta = dict(f.metadata)
        found.append(
            Option(
                name=f.name,
                section=section,
                title=kind.__doc__,
                type=hints[f.name],
                default=f.default,
                help=meta.pop("help"),
                aliases=meta.pop("aliases"),
                transient=meta.pop("transient"),
                bounds=meta,
            )
        )
    return tuple(found)


def by_name(name: str) -> Option:
    """The option of that name; hyphens, underscores, case and aliases don't matter."""
    return _lookup()[_canonical(name)]


def is_option(name: str) -> bool:
    """Whether there is an option of that name."""
    return _canonical(name) in _lookup()


def _canonical(name: str) -> str:
    return name.replace("_", "-").lower()


@cache
def _lookup() -> dict[str, Option]:
    return _by_key(options())


def _by_key(found: Sequence[Option]) -> dict[str, Option]:
    return {_canonical(key): opt for opt in found for key in (opt.name, *opt.aliases)}


# --- values ---------------------------------------------------------------------------------------


def convert(opt: Option, raw: Any) -> Any:
    """``raw`` (from YAML, or a string of the command line) as a value of ``opt``.

    Raises OptionError where it is none.
    """
    try:
        value = _convert(opt.type, raw)
    except ValueError:
        raise OptionError(opt.name, f"expected {opt.type_name}, got {raw!r}") from None
    for element in value if isinstance(value, tuple) else (value,):
        if isinstance(element, int | float) and not isinstance(element, bool):
            _check_bounds(opt, element)
    length = opt.bounds["length"]
    if length and isinstance(value, tuple) and not length[0] <= len(value) <= length[1]:
        wanted = str(length[0]) if length[0] == length[1] else f"{length[0]} to {length[1]}"
        raise OptionError(opt.name, f"takes {wanted} values, got {len(value)}")
    return value


def _check_bounds(opt: Option, value: float) -> None:
    b = opt.bounds
    failed = (
        (b["low"] is not None and not value >= b["low"], f"at least {b['low']}"),
        (b["above"] is not None and not value > b["above"], f"above {b['above']}"),
        (b["high"] is not None and not value <= b["high"], f"at most {b['high']}"),
        (b["below"] is not None and not value < b["below"], f"below {b['below']}"),
    )
    for wrong, wanted in failed:
        if wrong:
            raise OptionError(opt.name, f"must be {wanted}, got {value}")


def _convert(tp: Any, raw: Any) -> Any:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in _UNIONS:
        # None and named values first: str would take anything.
        for member in sorted(
            args, key=lambda a: a is not types.NoneType and typing.get_origin(a) is None
        ):
            try:
                return _convert(member, raw)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        # YAML 1.1 reads a bare off/on as a truth value.
        text = {False: "off", True: "on"}[raw] if isinstance(raw, bool) else str(raw)
        if text not in args:
            raise ValueError
        return text
    if origin is tuple:
        if isinstance(raw, str):
            raw = [raw] if args[0] is str else raw.replace(",", " ").split()
        elif not isinstance(raw, list | tuple):
            raw = [raw]
        return tuple(_convert(args[0], r) for r in raw)
    if tp is types.NoneType:
        if raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null", "")):
            return None
        raise ValueError
    if tp is bool:
        return _to_bool(raw)
    if tp is int:
        return _to_int(raw)
    if tp is float:
        return _to_float(raw)
    if raw is None or isinstance(raw, bool | list | dict):
        raise ValueError
    return str(raw)


def _to_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if str(raw).lower() not in words:
        raise ValueError
    return words[str(raw).lower()]


def _to_float(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError
    try:
        value = float(raw)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(value):
        raise ValueError
    return value


def _to_int(raw: Any) -> int:
    value = _to_float(raw)
    if value != int(value):
        raise ValueError
    return (
        int(raw) if isinstance(raw, int | str) and str(raw).lstrip("+-").isdigit() else int(value)
    )


# --- command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and option names in which ``-`` and ``_`` are the same."""

    known: Mapping[str, Option] = types.MappingProxyType({})

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [a for a in unknown if a.startswith("-")]
            if not flags:
                raise UserError(f"unexpected argument {unknown[0]!r}; options start with --")
            name = flags[0].split("=")[0]
            raise UserError(f"unknown option {name}{_nearest(name, self.known)}")
        return known

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._normalise(a) for a in args], namespace)

    def _normalise(self, arg: str) -> str:
        if not arg.startswith("--"):
            return arg
        name, equals, value = arg[2:].partition("=")
        key = _canonical(name)
        if key in self.known:
            return self.known[key].flag + equals + value
        if key.startswith("no-") and key[3:] in self.known:
            return "--no-" + self.known[key[3:]].flag[2:] + equals + value
        return arg


def _nearest(name: str, known: Mapping[str, Option]) -> str:
    close = difflib.get_close_matches(_canonical(name.lstrip("-")), list(known), n=1, cutoff=0.6)
    return f"; did you mean {known[close[0]].flag}?" if close else "; --help lists them all"


def get_parser(defaults: bool = True, launcher: Sequence[Option] = ()) -> Parser:
    """The command line. With ``defaults=False`` the namespace holds only what was given.

    ``launcher``: options that a launcher takes before those of the run.
    """
    parser = Parser(
        prog="main.py",
        usage="main.py [--config FILE.yaml] [--OPTION VALUE …]",
        description="Train and evaluate image classifiers: DeiT, CaiT, ResNet and any timm model.",
        epilog="Examples: main.py --model deit_small --data-path pets; main.py --config "
        "configs/quickstart.yaml --epochs 5; main.py --eval --resume output/run/best.pth",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        allow_abbrev=False,
    )
    everything = (*launcher, *options())
    parser.known = _by_key(everything)
    groups: dict[str, Any] = {}
    for opt in everything:
        if opt.section not in groups:
            groups[opt.section] = parser.add_argument_group(opt.title)
        help = opt.help.replace("%", "%%")
        if "default" not in help and opt.default not in ("", None, ()) and not opt.transient:
            help += f" (default: {_show(opt.default)})"
        default = opt.default if defaults else argparse.SUPPRESS
        keywords: dict[str, Any] = {"dest": opt.name, "help": help, "default": default}
        if opt.type in (bool, bool | None):
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords |= {"type": _argument_type(opt), "metavar": opt.type_name.replace(" …", "")}
            if _is_tuple(opt.type):
                keywords |= {"nargs": "+", "action": _StoreTuple, "opt": opt, "type": str}
        groups[opt.section].add_argument(opt.flag, **keywords)
    return parser


def _is_tuple(tp: Any) -> bool:
    return typing.get_origin(tp) is tuple or any(
        typing.get_origin(a) is tuple for a in typing.get_args(tp)
    )


def _argument_type(opt: Option) -> Callable[[str], Any]:
    return lambda raw: convert(opt, raw)


class _StoreTuple(argparse.Action):
    def __init__(self, *, opt: Option, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.opt = opt

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        raw = values[0] if len(values) == 1 else values
        setattr(namespace, self.dest, convert(self.opt, raw))


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_show(v) for v in value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return "none" if value is None else str(value)


# --- files ----------------------------------------------------------------------------------------


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The options of a config file and the files it builds on, lowest precedence first.

    Returns (origin, {option: value}) pairs. ``base:`` is taken relative to the file that names it.
    """
    import yaml

    path = path.expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        # The loader keeps the last of several equal keys and says nothing.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise OptionError("config", f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("config", f"{path} can't be read: {error}") from None
    except RecursionError:
        raise OptionError("config", f"{path}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise OptionError("config", f"{path}{where}: {problem}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise OptionError("config", f"{path}: expected 'option: value' lines")
    keys = [key.value for key, _ in node.value] if data else []
    for key in keys:
        if keys.count(key) > 1:
            raise OptionError("config", f"{path}: {key} is there twice")
    layers = []
    base = data.pop("base", None)
    if base is not None:
        base_path = (path.parent / str(base)).resolve()
        if base_path in (*_seen, path.resolve()):
            raise OptionError("config", f"{path}: base: {base} leads back to itself")
        layers = read_yaml(base_path, (*_seen, path.resolve()))
    values = {}
    for key, raw in data.items():
        if _canonical(str(key)) not in _lookup():
            raise OptionError(
                "config", f"{path}: unknown option {key!r}{_nearest(str(key), _lookup())}"
            )
        opt = by_name(str(key))
        if opt.name in ("config", "print_config"):
            raise OptionError(
                "config", f"{path}: {key} belongs on the command line; use base: to build on a file"
            )
        if opt.name in values:
            raise OptionError("config", f"{path}: {key} is there twice")
        try:
            values[opt.name] = convert(opt, raw)
        except OptionError as error:
            raise UserError(f"{path}: {error}") from None
    return [*layers, (str(path), values)]


# --- the whole ------------------------------------------------------------------------------------


def from_flat(values: Mapping[str, Any], origin: Mapping[str, str]) -> Config:
    """A Config from options by name; what is missing takes its default. Checked as a whole."""
    sections: dict[str, dict[str, Any]] = {}
    origins = {}
    for opt in options():
        given = opt.name in values
        value = convert(opt, values[opt.name]) if given else opt.default
        sections.setdefault(opt.section, {})[opt.name] = value
        origins[opt.name] = origin.get(opt.name, DEFAULT) if given else DEFAULT
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    config = Config(
        **{name: kinds[name](**fields) for name, fields in sections.items()}, origin=origins
    )
    _validate(config)
    return config


def load(
    argv: Sequence[str] | None = None,
    underneath: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Config:
    """The Config of a command line.

    ``underneath`` is given the options that the config file and the command line set, and returns
    others (those a checkpoint holds) that rank between the defaults and the config file.
    """
    return resolve(vars(get_parser(defaults=False).parse_args(argv)), underneath)


def resolve(
    given: Mapping[str, Any],
    underneath: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Config:
    """The Config of options ``given`` on a command line; ``underneath`` as for :func:`load`."""
    layers = read_yaml(Path(given["config"])) if given.get("config") else []
    layers.append((COMMAND_LINE, given))
    if underneath:
        below = underneath({name: value for _, layer in layers for name, value in layer.items()})
        layers.insert(0, (CHECKPOINT, dict(below)))
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, where)
    return from_flat(values, origin)


def _conflicts(c: Config) -> Iterator[tuple[bool, str, str]]:
    """(is wrong, option, what is wrong and how to mend it) for every impossible combination."""
    loss, aug, run, sched = c.loss, c.augment, c.run, c.schedule
    yield (
        loss.bce_loss and loss.smoothing > 0,
        "bce_loss",
        "would turn every smoothed target into a full 1: add --smoothing 0 "
        "(--loss bce keeps soft targets soft)",
    )
    yield (
        loss.bce_loss and loss.loss not in ("auto", "bce"),
        "bce_loss",
        f"contradicts --loss {loss.loss}: leave one out",
    )
    yield (
        c.model.talking_heads == "fused"
        and (c.optim.amp == "off" or c.optim.rollback_fp32_steps > 0),
        "talking_heads",
        "fused is for half precision: leave out --amp off and --rollback-fp32-steps",
    )
    yield (
        loss.cosub and loss.loss not in ("auto", "bce"),
        "cosub",
        f"is defined on BCE, not on --loss {loss.loss}: leave --loss out",
    )
    yield (
        loss.cosub and loss.distillation_type != "none",
        "cosub",
        "can't be combined with --distillation-type: its submodels are each other's teacher",
    )
    yield (
        loss.distillation_type != "none" and not loss.teacher_path,
        "distillation_type",
        f"{loss.distillation_type} needs a teacher: add --teacher-path FILE, --teacher-model NAME",
    )
    yield (
        loss.distillation_type != "none" and not aug.train_mode,
        "train_mode",
        "a distilled model gives both its heads in training mode only: leave out --no-train-mode",
    )
    yield (
        bool(loss.teacher_path) and loss.distillation_type == "none",
        "teacher_path",
        "is not used without distillation: add --distillation-type hard (or soft)",
    )
    yield (
        aug.repeated_aug and c.data.sampler == "balanced",
        "sampler",
        "balanced draws every picture on its own, repeated augmentation three times: "
        "add --no-repeated-aug",
    )
    yield (
        aug.resplit and not aug.repeated_aug,
        "resplit",
        "means the copies of repeated augmentation: add --repeated-aug or leave it out",
    )
    one_by_one = not aug.ThreeAugment and (aug.aa or "").startswith(("augmix", "trivial"))
    yield (
        aug.augment_on == "device" and one_by_one,
        "augment_on",
        f"{aug.aa} takes one picture at a time: use cpu, or another --aa",
    )
    yield (
        c.data.cache == "device" and (aug.augment_on == "cpu" or one_by_one),
        "cache",
        "device needs --augment-on device: pictures would come back one by one",
    )
    yield (
        aug.ThreeAugment and aug.aa is not None and "aa" in c.explicit(),
        "ThreeAugment",
        "takes the place of --aa: leave one out, or --aa none",
    )
    for unwanted, name, why in (
        (c.optim.amp == "fp16", "amp", "fp16 needs a loss scaler for whole gradients: use bf16"),
        (c.optim.clip_mode == "agc", "clip_mode", "agc looks at whole weights: use norm"),
        (c.optim.rollback_fp32_steps > 0, "rollback_fp32_steps", "the type is fixed: leave it out"),
        (c.ema.model_ema_force_cpu, "model_ema_force_cpu", "the average is spread: leave it out"),
        (bool(c.model.unfreeze_at), "unfreeze_at", "what is trained is fixed: use --freeze alone"),
        (c.model.compile, "compile", "is not supported together: leave one out"),
        (bool(c.model.channels_last), "channels_last", "is not supported together: leave one out"),
        (c.log.tb_histograms, "tb_histograms", "no process has whole weights: leave it out"),
        (c.log.tb_graph, "tb_graph", "no process has whole weights: leave it out"),
        (c.optim.opt.lower() not in FSDP_OPTIMIZERS, "opt",
         f"{c.optim.opt} looks at whole weights: use {', '.join(FSDP_OPTIMIZERS)}"),
    ):  # fmt: skip
        yield c.dist.fsdp and unwanted and not run.eval, name, f"with --fsdp: {why}"
    auto = c.data.batch_size == "auto"
    yield (
        auto and "accum_steps" in c.explicit(),
        "accum_steps",
        "is chosen by --batch-size auto: give --effective-batch",
    )
    yield aug.scale[0] > aug.scale[1], "scale", "the first value must not exceed the second"
    yield aug.ratio[0] > aug.ratio[1], "ratio", "the first value must not exceed the second"
    yield (
        aug.cutmix_minmax is not None and aug.cutmix_minmax[0] >= aug.cutmix_minmax[1],
        "cutmix_minmax",
        "the first value must be below the second",
    )
    yield (
        sched.warmup_epochs >= run.epochs and not run.eval,
        "warmup_epochs",
        f"{sched.warmup_epochs:g} leaves nothing of --epochs {run.epochs}: lower it (0: none)",
    )
    yield (
        sched.sched == "multistep" and not sched.decay_milestones,
        "decay_milestones",
        "--sched multistep needs the epochs of its decays, e.g. --decay-milestones 30 60 90",
    )
    yield (
        sched.lr_noise is not None and sched.sched in ("plateau", "onecycle", "constant"),
        "lr_noise",
        f"is not defined for --sched {sched.sched}: leave it out",
    )
    yield (
        sched.sched == "onecycle" and sched.cooldown_epochs > 0,
        "cooldown_epochs",
        "onecycle ends at its lowest rate by itself: leave it out",
    )
    yield (
        run.eval and not (run.resume or c.model.pretrained or c.model.finetune),
        "eval",
        "needs a model: add --resume FILE",
    )
    yield (
        run.start_epoch >= run.epochs + sched.cooldown_epochs and not run.eval,
        "start_epoch",
        f"{run.start_epoch} leaves nothing of --epochs {run.epochs}: lower it",
    )
    for name in ("mean", "std"):
        value = getattr(c.data, name)
        yield value is not None and len(value) == 2, name, "takes one or three values, got 2"
    yield (
        c.model.pretrained and bool(c.model.finetune),
        "pretrained",
        "and --finetune both name where to start: leave one out",
    )
    yield (
        c.optim.rollback_fp32_steps > 0 and c.optim.on_nonfinite != "rollback",
        "rollback_fp32_steps",
        "needs --on-nonfinite rollback",
    )
    yield (
        bool(c.model.unfreeze_at) and not c.model.freeze,
        "unfreeze_at",
        "needs something frozen: add --freeze PATTERN",
    )
    for rule in c.model.unfreeze_at:
        epoch, colon, pattern = rule.partition(":")
        yield (
            not (epoch.isdigit() and colon and pattern),
            "unfreeze_at",
            f"{rule!r} is not EPOCH:PATTERN, e.g. 5:blocks.11.*",
        )
    yield (
        c.model.attn_only and bool(c.model.freeze),
        "attn_only",
        "and --freeze both say what is fixed: leave one out",
    )
    yield (
        c.save.best_metric.startswith("ema_") and not c.ema.model_ema,
        "best_metric",
        f"{c.save.best_metric} needs --model-ema",
    )
    metrics = (
        "test_acc1",
        "test_acc5",
        "test_loss",
        "ema_acc1",
        "ema_acc5",
        "ema_loss",
        "train_loss",
    )
    close = difflib.get_close_matches(c.save.best_metric, metrics, n=1)
    yield (
        c.save.best_metric not in metrics,
        "best_metric",
        f"{c.save.best_metric!r} is not logged; one of {', '.join(metrics)}"
        + (f" (did you mean {close[0]}?)" if close else ""),
    )


def unused(c: Config) -> list[str]:
    """A line for each option that was asked for but has no effect beside the others."""
    sched, aug, loss = c.schedule.sched, c.augment, c.loss
    mixing = aug.mixup > 0 or aug.cutmix > 0 or aug.cutmix_minmax is not None
    needs = {
        "decay_milestones": (sched == "multistep", "--sched multistep"),
        "decay_epochs": (sched == "step", "--sched step"),
        "decay_rate": (sched in ("step", "multistep", "plateau"), "--sched step or plateau"),
        "patience_epochs": (sched == "plateau", "--sched plateau"),
        "restart_epochs": (sched == "cosine-restarts", "--sched cosine-restarts"),
        "restart_mul": (sched == "cosine-restarts", "--sched cosine-restarts"),
        "restart_decay": (sched == "cosine-restarts", "--sched cosine-restarts"),
        "poly_power": (sched == "poly", "--sched poly"),
        "lr_noise_pct": (c.schedule.lr_noise is not None, "--lr-noise"),
        "lr_noise_std": (c.schedule.lr_noise is not None, "--lr-noise"),
        "clip_mode": (c.optim.clip_grad is not None, "--clip-grad"),
        "focal_gamma": (loss.loss in ("focal", "quality-focal"), "--loss focal"),
        "teacher_model": (loss.distillation_type != "none", "--distillation-type"),
        "distillation_alpha": (loss.distillation_type != "none", "--distillation-type"),
        "distillation_tau": (loss.distillation_type == "soft", "--distillation-type soft"),
        "mixup_prob": (mixing, "--mixup or --cutmix"),
        "mixup_switch_prob": (mixing, "--mixup and --cutmix"),
        "mixup_mode": (mixing, "--mixup or --cutmix"),
        "remode": (aug.reprob > 0, "--reprob"),
        "recount": (aug.reprob > 0, "--reprob"),
        "model_ema_decay": (c.ema.model_ema, "--model-ema"),
        "model_ema_warmup": (c.ema.model_ema, "--model-ema"),
        "model_ema_force_cpu": (c.ema.model_ema, "--model-ema"),
        "early_stop_delta": (c.save.early_stop > 0, "--early-stop"),
        "compile_mode": (c.model.compile, "--compile"),
        "inat_category": (c.data.data_set.upper().startswith("INAT"), "--data-set INAT"),
    }
    asked = c.explicit()
    return [
        f"{by_name(name).flag} has no effect without {need}"
        for name, (used, need) in needs.items()
        if name in asked and not used
    ]


def _validate(config: Config) -> None:
    for wrong, name, message in _conflicts(config):
        if wrong:
            raise OptionError(name, message)


def to_yaml(config: Config, *, origins: bool = False, everything: bool = False) -> str:
    """The options as YAML that ``--config`` takes; with ``origins``, where each came from.

    ``everything`` includes the transient options.
    """
    import yaml

    lines = []
    values = config.flat() if everything else config.recipe()
    section = None
    for opt in options():
        if opt.name not in values or opt.name in ("config", "print_config"):
            continue
        if opt.section != section:
            section = opt.section
            lines += ["", f"# {opt.title}"] if lines else [f"# {opt.title}"]
        value = yaml.safe_dump(values[opt.name], default_flow_style=True, width=4096)
        line = f"{opt.name}: {value.removesuffix('...' + chr(10)).strip()}"
        lines.append(f"{line:<40}  # {config.origin[opt.name]}" if origins else line)
    return "\n".join(lines) + "\n"


def options_table() -> str:
    """``docs/options.md``: every option in Markdown tables, one a section."""
    lines = [
        "# Options",
        "",
        "Made from `config.py` by `python -m tools.docs`. Hyphens and underscores are the same,",
        "and every name is a YAML key.",
    ]
    for title, members in itertools.groupby(options(), key=lambda opt: opt.title):
        lines += ["", f"## {title}", ""]
        lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
        for opt in members:
            default = _show(opt.default) if opt.default not in ("", ()) else ""
            cells = (f"`{opt.flag}`", opt.type_name, default, opt.help)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
