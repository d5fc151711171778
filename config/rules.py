"""Combinations of options that are impossible, and options without effect beside the others."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from config import augmentation_rules, channel_rules
from config.background import background_colour
from config.class_weights import parse_class_weights
from config.declared import by_name
from config.keywords import keyword_conflicts
from config.metrics import unknown_metric
from config.multilabel import is_multilabel, multilabel_conflicts
from config.train_sizes import stages
from errors import OptionError, did_you_mean, shown

if TYPE_CHECKING:
    from config.config import Config

# Those that treat each element of a weight by itself, or take norms that sharded tensors have too.
FSDP_OPTIMIZERS = ("adamw", "adam", "nadamw", "sgd", "momentum", "lamb", "lion")

# apex's fused kernels by timm's names, and the optimiser of the same update, which needs no apex.
# FusedLAMB also limits the norm of all gradients to 1; timm's Lamb, written after it, does so too.
FUSED_OPTIMIZERS = {
    "fusedlamb": "lamb",
    "fusedadam": "adam",
    "fusedadamw": "adamw",
    "fusedsgd": "sgd",
    "fusedmomentum": "momentum",
}

# Where --log-to sends what TensorBoard gets.
TRACKERS = ("wandb", "mlflow", "trackio")

Errors = Iterator[OptionError]


def optimizer_name(opt: str) -> str:
    """The optimiser that ``--opt`` stands for, by its name in timm's registry."""
    name = opt.lower()
    prefix = "lookahead_" if name.startswith("lookahead_") else ""
    base = name.removeprefix(prefix)
    return prefix + FUSED_OPTIMIZERS.get(base, base)


def conflicts(config: "Config") -> Errors:
    """An error for every impossible combination: the option, what is wrong and how to fix it.

    Where several are wrong, the order of the functions at the end decides which comes first.
    """
    for find in _SUBJECTS:
        yield from find(config)


# --- loss and distillation ------------------------------------------------------------------------


def _binary_cross_entropy(config: "Config") -> Errors:
    loss = config.loss
    if loss.bce_loss and loss.smoothing > 0:
        yield OptionError(
            "bce_loss",
            "would turn every smoothed target into a full 1: add --smoothing 0 "
            "(--loss bce keeps soft targets soft)",
        )
    if loss.bce_loss and loss.loss not in ("auto", "bce"):
        yield OptionError("bce_loss", f"contradicts --loss {loss.loss}: leave one out")


def _class_weights(config: "Config") -> Errors:
    try:
        parse_class_weights(config.loss.class_weights)
    except OptionError as error:
        yield error


def _cosub(config: "Config") -> Errors:
    loss = config.loss
    if loss.cosub and loss.loss not in ("auto", "bce"):
        yield OptionError(
            "cosub", f"is defined on BCE, not on --loss {loss.loss}: leave --loss out"
        )
    if loss.cosub and loss.distillation_type != "none":
        yield OptionError(
            "cosub",
            "can't be combined with --distillation-type: its submodels are each other's teacher",
        )


def _distillation(config: "Config") -> Errors:
    loss = config.loss
    if loss.distillation_type == "none":
        if loss.teacher_path:
            yield OptionError(
                "teacher_path",
                "is not used without distillation: add --distillation-type hard (or soft)",
            )
        return
    if not loss.teacher_path:
        yield OptionError(
            "distillation_type",
            f"{loss.distillation_type} needs a teacher: "
            "add --teacher-path FILE, --teacher-model NAME",
        )
    if not config.augment.train_mode:
        yield OptionError(
            "train_mode",
            "a distilled model gives both its heads in training mode only: "
            "leave out --no-train-mode",
        )


# --- model ----------------------------------------------------------------------------------------


def _talking_heads(config: "Config") -> Errors:
    full_precision = config.optim.amp == "off" or config.optim.rollback_fp32_steps > 0
    if config.model.talking_heads == "fused" and full_precision:
        yield OptionError(
            "talking_heads",
            "fused is for half precision: leave out --amp off and --rollback-fp32-steps",
        )


def _initial_weights(config: "Config") -> Errors:
    if config.model.pretrained and config.model.finetune:
        yield OptionError("pretrained", "and --finetune both name where to start: leave one out")


def _train_sizes(config: "Config") -> Errors:
    try:
        stages(config.model.train_sizes)
    except OptionError as error:
        yield error


def _freezing(config: "Config") -> Errors:
    model = config.model
    if model.unfreeze_at and not model.freeze:
        yield OptionError("unfreeze_at", "needs something frozen: add --freeze PATTERN")
    for rule in model.unfreeze_at:
        if not re.fullmatch(r"[0-9]{1,9}:.+", rule):
            yield OptionError(
                "unfreeze_at", f"{shown(rule)} is not EPOCHS:PATTERN, e.g. 5:blocks.11.*"
            )
    if model.attn_only and model.freeze:
        yield OptionError("attn_only", "and --freeze both say what is fixed: leave one out")


def _lora(config: "Config") -> Errors:
    model = config.model
    if not model.lora or config.run.eval:
        return
    if model.attn_only:
        yield OptionError("lora", "and --attn-only both say what is trained: leave one out")


# --- data and augmentation ------------------------------------------------------------------------


def _batch_size(config: "Config") -> Errors:
    if config.data.batch_size == "auto" and "accum_steps" in config.explicit():
        yield OptionError("accum_steps", "is chosen by --batch-size auto: give --effective-batch")


def _ranges(config: "Config") -> Errors:
    augment = config.augment
    if augment.scale[0] > augment.scale[1]:
        yield OptionError("scale", "the first value must not exceed the second")
    if augment.ratio[0] > augment.ratio[1]:
        yield OptionError("ratio", "the first value must not exceed the second")
    sides = augment.cutmix_minmax
    if sides is not None and sides[0] >= sides[1]:
        yield OptionError("cutmix_minmax", "the first value must be below the second")


def _background(config: "Config") -> Errors:
    try:
        background_colour(config.data.background)
    except OptionError as error:
        yield error


# --- schedule, epochs and checkpoints -------------------------------------------------------------


def _schedule(config: "Config") -> Errors:
    schedule, run = config.schedule, config.run
    kind = schedule.sched
    if schedule.warmup_epochs >= run.epochs and not run.eval:
        yield OptionError(
            "warmup_epochs",
            f"{schedule.warmup_epochs:g} leaves nothing of --epochs {run.epochs}: "
            "lower it (0: none)",
        )
    if kind == "multistep" and not schedule.decay_milestones:
        yield OptionError(
            "decay_milestones",
            "--sched multistep needs the epochs of its decays, e.g. --decay-milestones 30 60 90",
        )
    if schedule.lr_noise is not None and kind in ("plateau", "onecycle", "constant"):
        yield OptionError("lr_noise", f"is not defined for --sched {kind}: leave it out")
    if kind == "onecycle" and schedule.cooldown_epochs > 0:
        yield OptionError(
            "cooldown_epochs", "onecycle ends at its lowest rate by itself: leave it out"
        )


def _evaluation(config: "Config") -> Errors:
    has_model = config.run.resume or config.model.pretrained or config.model.finetune
    if config.run.eval and not has_model:
        yield OptionError("eval", "needs a model: add --resume FILE")


def _start_epoch(config: "Config") -> Errors:
    run = config.run
    if run.start_epoch >= run.epochs + config.schedule.cooldown_epochs and not run.eval:
        yield OptionError(
            "start_epoch", f"{run.start_epoch} leaves nothing of --epochs {run.epochs}: lower it"
        )


def _rollback(config: "Config") -> Errors:
    if config.optim.rollback_fp32_steps > 0 and config.optim.on_nonfinite != "rollback":
        yield OptionError("rollback_fp32_steps", "needs --on-nonfinite rollback")


def _best_metric(config: "Config") -> Errors:
    metric = config.save.best_metric
    if metric.startswith("ema_") and not config.ema.model_ema:
        yield OptionError("best_metric", f"{metric} needs --model-ema")
    if wrong := unknown_metric(metric, config.data.task):
        yield OptionError("best_metric", wrong)


# --- logs -----------------------------------------------------------------------------------------


def _trackers(config: "Config") -> Errors:
    for name in config.log.log_to:
        if name not in TRACKERS:
            known = f"one of {', '.join(TRACKERS)}"
            yield OptionError(
                "log_to", f"{name!r} is no tracker: {did_you_mean(name, TRACKERS, otherwise=known)}"
            )


# --- several processes ----------------------------------------------------------------------------


def _fsdp(config: "Config") -> Errors:
    """What needs whole weights, or weights that stay as they are. Evaluation needs neither."""
    if not config.dist.fsdp or config.run.eval:
        return
    for name, why in _fsdp_conflicts(config):
        yield OptionError(name, f"with --fsdp: {why}")


def _fsdp_conflicts(config: "Config") -> Iterator[tuple[str, str]]:
    optim, model, log = config.optim, config.model, config.log
    if optim.amp == "fp16":
        yield "amp", "fp16 needs a loss scaler for whole gradients: use bf16"
    if optim.clip_mode == "agc":
        yield "clip_mode", "agc looks at whole weights: use norm"
    if optim.rollback_fp32_steps > 0:
        yield "rollback_fp32_steps", "the type is fixed: leave it out"
    if config.ema.model_ema_force_cpu:
        yield "model_ema_force_cpu", "the average is sharded: leave it out"
    if model.unfreeze_at:
        yield "unfreeze_at", "what is trained is fixed: use --freeze alone"
    if model.compile:
        yield "compile", "is not supported together: leave one out"
    if model.channels_last:
        yield "channels_last", "is not supported together: leave one out"
    if log.tb_histograms:
        yield "tb_histograms", "no process has whole weights: leave it out"
    if log.tb_graph:
        yield "tb_graph", "no process has whole weights: leave it out"
    if optimizer_name(optim.opt) not in FSDP_OPTIMIZERS:
        yield "opt", f"{optim.opt} looks at whole weights: use {', '.join(FSDP_OPTIMIZERS)}"


_SUBJECTS = (
    multilabel_conflicts,
    _binary_cross_entropy,
    _talking_heads,
    _class_weights,
    _cosub,
    _distillation,
    *augmentation_rules.SUBJECTS,
    _fsdp,
    _batch_size,
    _ranges,
    _schedule,
    _evaluation,
    _start_epoch,
    *channel_rules.SUBJECTS,
    _background,
    _initial_weights,
    _rollback,
    _train_sizes,
    _freezing,
    _lora,
    keyword_conflicts,
    _best_metric,
    _trackers,
)


# --- options without effect -----------------------------------------------------------------------


def unused(config: "Config") -> list[str]:
    """A line for each option that was given but has no effect beside the others."""
    given = config.given()
    lines = [
        f"{by_name(name).flag} has no effect without {need}"
        for need, met, names in _needs(config)
        for name in names
        if name in given and not met
    ]
    erasing = ("reprob", "remode", "recount", "resplit")
    if config.augment.ThreeAugment and config.augment.reprob > 0:
        lines += [
            f"{by_name(name).flag} has no effect with --ThreeAugment, which never erases"
            for name in erasing
            if name in given
        ]
    return lines


def _needs(config: "Config") -> tuple[tuple[str, bool, tuple[str, ...]], ...]:
    """(what is needed, whether the config has it, the options without effect where it hasn't)."""
    sched, augment, loss = config.schedule.sched, config.augment, config.loss
    noise = config.schedule.lr_noise is not None
    distills = loss.distillation_type != "none"
    cuts = augment.cutmix > 0 or augment.cutmix_minmax is not None
    mixes = augment.mixup > 0 or cuts
    jittered = augmentation_rules.jitters(augment)
    # One strength is part of the DeiT recipe, whose policy takes its place.
    several = isinstance(augment.color_jitter, tuple) and any(augment.color_jitter)
    restarts = ("restart_epochs", "restart_mul", "restart_decay")
    average = ("model_ema_decay", "model_ema_warmup", "model_ema_force_cpu")
    inat = config.data.data_set.upper().startswith("INAT")
    table = ("image_root", "image_column", "label_column", "split_column")
    labels = ("class_map", "valid_labels", "real_labels")
    multilabel = ("label_columns", "label_separator", "pos_weight")
    return (
        ("--sched multistep", sched == "multistep", ("decay_milestones",)),
        ("--sched step", sched == "step", ("decay_epochs",)),
        ("--sched step or plateau", sched in ("step", "multistep", "plateau"), ("decay_rate",)),
        ("--sched plateau", sched == "plateau", ("patience_epochs",)),
        ("--sched cosine-restarts", sched == "cosine-restarts", restarts),
        ("--sched poly", sched == "poly", ("poly_power",)),
        ("--lr-noise", noise, ("lr_noise_pct", "lr_noise_std")),
        ("--clip-grad", config.optim.clip_grad is not None, ("clip_mode",)),
        ("--task multilabel", is_multilabel(config), multilabel),
        ("--loss asl", loss.loss == "asl", ("asl_gamma_neg", "asl_gamma_pos", "asl_clip")),
        ("--loss focal", loss.loss in ("focal", "quality-focal"), ("focal_gamma",)),
        ("--distillation-type", distills, ("teacher_model", "distillation_alpha")),
        ("--distillation-type soft", loss.distillation_type == "soft", ("distillation_tau",)),
        ("--mixup or --cutmix", mixes, ("mixup_prob", "mixup_mode", "mixup_off_epoch")),
        ("jitter: --aa none, 3a or --ThreeAugment", jittered, ("color_jitter_prob",)),
        ("--aa none, 3a or --ThreeAugment", jittered or not several, ("color_jitter",)),
        ("--mixup and --cutmix", augment.mixup > 0 and cuts, ("mixup_switch_prob",)),
        ("--reprob", augment.reprob > 0, ("remode", "recount")),
        ("--model-ema", config.ema.model_ema, average),
        ("--early-stop", config.save.early_stop > 0, ("early_stop_delta",)),
        ("--compile", config.model.compile, ("compile_mode",)),
        ("--data-set INAT", inat, ("inat_category",)),
        ("--data-set CSV", config.data.data_set.upper() == "CSV", table),
        ("--eval", config.run.eval, labels),
        ("--finetune", bool(config.model.finetune), ("allow_partial",)),
        ("--lora", config.model.lora > 0, ("lora_alpha", "lora_targets")),
        ("--log-to", bool(config.log.log_to), ("log_project", "log_name")),
    )
