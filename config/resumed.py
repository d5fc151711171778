"""What becomes of each option when a run goes on from a checkpoint: the one place that says it.

``docs/resume.md`` has this as a table, and ``training/resume.py`` refuses what is refused here.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["kept", "taken anew", "refused"]


@dataclass(frozen=True)
class OnResume:
    """What becomes of some options."""

    kind: Kind
    options: tuple[str, ...]
    note: str
    """What that means for the run; of refused ones, why."""


ON_RESUME = (
    OnResume(
        "refused",
        ("model",),
        "the weights are another model's",
    ),
    OnResume(
        "refused",
        ("task",),
        "the weights have learned another task",
    ),
    OnResume(
        "refused",
        ("opt", "opt_kwargs"),
        "its state doesn't fit another optimiser",
    ),
    OnResume(
        "refused",
        ("model_kwargs", "global_pool", "bn_eps"),
        "the weights belong to another form of the model",
    ),
    OnResume(
        "refused",
        ("in_chans", "bit_depth"),
        "the weights have learned other images",
    ),
    OnResume(
        "refused",
        ("lora", "lora_alpha", "lora_targets"),
        "the adapters belong to other layers or another scale",
    ),
    OnResume(
        "refused",
        ("val_fraction",),
        "images that were trained on would be validated on",
    ),
    OnResume(
        "refused",
        ("overfit_batches",),
        "a sanity run is not a training",
    ),
    OnResume(
        "kept",
        ("pretrained", "finetune", "allow_partial", "head_init_scale"),
        "the weights are the checkpoint's; those it started from are not read again",
    ),
    OnResume(
        "kept",
        ("mean", "std", "background"),
        "as the run began, unless given",
    ),
    OnResume(
        "taken anew",
        ("seed",),
        "of all that is drawn from here on; what `--val-fraction` held out stays held out; an "
        "epoch under way goes on in another order",
    ),
    OnResume(
        "taken anew",
        (
            *("data_path", "data_set", "inat_category", "download"),
            *("image_root", "image_column", "label_column", "split_column"),
            *("label_columns", "label_separator"),
        ),
        "the classes must be the same, in the same order; images that came are trained on, those "
        "that were held out stay so, wherever the folder is now",
    ),
    OnResume(
        "taken anew",
        ("sampler", "repeated_aug"),
        "an epoch under way goes on in another order: some of its images come twice, some not",
    ),
    OnResume(
        "taken anew",
        ("batch_size", "effective_batch", "accum_steps", "world_size"),
        "no image of the epoch is skipped or repeated; the rate is the new batch's; `auto` is "
        "found anew",
    ),
    OnResume(
        "taken anew",
        ("epochs", "cooldown_epochs"),
        "the schedule is that of the new length; with more epochs a run that `--early-stop` ended "
        "goes on, its patience counted anew",
    ),
    OnResume(
        "taken anew",
        ("stop_at_epoch",),
        "in epochs of the whole run: repeated, it trains nothing more",
    ),
    OnResume("taken anew", ("stop_after",), "in hours of each session"),
    OnResume(
        "taken anew",
        ("start_epoch",),
        "in place of the checkpoint's count; a best score of later epochs is forgotten",
    ),
    OnResume(
        "taken anew",
        ("lr", "unscale_lr"),
        "the rate that plateau had come down to and the rollbacks are forgotten",
    ),
    OnResume(
        "taken anew",
        (
            *("sched", "lr_noise", "lr_noise_pct", "lr_noise_std", "warmup_lr", "min_lr"),
            *("warmup_epochs", "decay_epochs", "decay_milestones", "decay_rate"),
            *("patience_epochs", "restart_epochs", "restart_mul", "restart_decay", "poly_power"),
        ),
        "the rate is where the new schedule is at this update",
    ),
    OnResume(
        "taken anew",
        ("opt_eps", "opt_betas", "momentum", "weight_decay", "clip_grad", "clip_mode"),
        "the optimiser's moments stay",
    ),
    OnResume(
        "taken anew",
        ("layer_decay", "head_lr_scale"),
        "another value; refused where the parameters are grouped in another way, as from none to "
        "some",
    ),
    OnResume(
        "taken anew",
        ("amp", "on_nonfinite", "rollback_fp32_steps"),
        "the loss scale of fp16 stays, or starts anew where there was none",
    ),
    OnResume(
        "taken anew",
        ("best_metric",),
        "the best checkpoint that is still there under the new metric is what has to be beaten; "
        "the patience of `--early-stop` and plateau count anew",
    ),
    OnResume(
        "taken anew",
        ("val_interval",),
        "from here on",
    ),
    OnResume(
        "taken anew",
        ("early_stop", "early_stop_delta"),
        "a run that has stopped has stopped: a larger patience, 0, another `--best-metric` or "
        "more epochs go on",
    ),
    OnResume(
        "taken anew",
        ("model_ema", "model_ema_decay", "model_ema_warmup", "model_ema_force_cpu"),
        "an average that was not kept before starts from the weights",
    ),
    OnResume(
        "taken anew",
        ("attn_only", "freeze", "unfreeze_at"),
        "what is trained from here on; parameters that were fixed have no moments yet",
    ),
    OnResume(
        "taken anew",
        ("input_size",),
        "refused where weights depend on it (position embeddings)",
    ),
    OnResume(
        "taken anew",
        ("train_sizes",),
        "the size of the epoch under way too: it follows from the number of the epoch",
    ),
    OnResume(
        "taken anew",
        ("eval_crop_ratio", "crop_mode", "interpolation"),
        "scores before and after are of unlike images",
    ),
    OnResume(
        "taken anew",
        ("drop", "drop_path", "drop_block", "bn_momentum", "train_mode"),
        "from here on",
    ),
    OnResume(
        "taken anew",
        (
            *("color_jitter", "aa", "train_interpolation", "jpeg_scaling", "augment_on"),
            *("color_jitter_prob", "grayscale_prob", "blur_prob", "rotate", "perspective"),
            *("ThreeAugment", "train_crop_mode", "src", "scale", "ratio", "hflip", "vflip"),
            *("reprob", "remode", "recount", "resplit", "aug_splits"),
            *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
            "mixup_off_epoch",
        ),
        "from here on",
    ),
    OnResume(
        "taken anew",
        ("transform", "albumentations"),
        "from here on; the plug-in and the file are read anew",
    ),
    OnResume(
        "taken anew",
        ("cache", "cache_side"),
        "of the session, but for `disk`: with it, training images come from smaller ones from here "
        "on",
    ),
    OnResume(
        "taken anew",
        (
            *("loss", "bce_loss", "smoothing", "focal_gamma", "class_weights", "cosub"),
            "jsd_loss",
            *("pos_weight", "asl_gamma_neg", "asl_gamma_pos", "asl_clip"),
            *("teacher_model", "teacher_path", "distillation_type", "distillation_alpha"),
            "distillation_tau",
        ),
        "from here on; a best `train_loss` is forgotten",
    ),
    OnResume(
        "taken anew",
        ("save_every", "save_every_steps", "save_every_minutes", "keep"),
        "from here on; a smaller `--keep` removes older checkpoints",
    ),
    OnResume(
        "taken anew",
        ("log_to", "log_project", "log_name"),
        "the same tracked run goes on; another project or name begins another one",
    ),
    OnResume(
        "taken anew",
        (
            *("config", "print_config", "output_dir", "resume", "eval", "device", "plugin"),
            *("deterministic", "grad_checkpointing", "channels_last", "compile", "compile_mode"),
            *("talking_heads", "on_bad_image", "eval_batch_size", "num_workers"),
            *("loader_timeout", "pin_mem", "shard_cache", "shard_cache_gb"),
            *("cache_dir", "cache_gb"),
            *("class_map", "valid_labels", "real_labels", "max_image_pixels"),
            *("print_epoch", "log_interval", "tensorboard", "tb_histograms", "tb_graph"),
            *("log_level", "profile"),
            *("distributed", "dist_url", "dist_eval", "dist_timeout", "dist_start_timeout"),
            *("fsdp", "sync_bn"),
        ),
        "of the session, not of the run",
    ),
)


def on_resume(option: str) -> OnResume:
    """What becomes of an option."""
    return next(rule for rule in ON_RESUME if option in rule.options)
