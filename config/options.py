"""Every option, declared once: name, type, default, help text and range, by section.

The command line, the YAML check, ``--help``, the saved ``config.yaml`` and ``docs/options.md`` are
made from the dataclasses below. Precedence, lowest first: default, the ``base:`` of a config file,
the config file, the command line.

To add an option:

1. Declare it in its section: ``name: type = option(default, "help text", low=0)``. The types are
   ``bool``, ``int``, ``float``, ``str``, ``Literal["a", "b"]``, ``tuple[type, ...]`` and unions of
   them with ``None`` or a ``Literal``. Every number has a range. The default is appended to the
   help text, unless the text itself has a "(default: …)".
2. Read it as ``config.SECTION.name`` where it takes effect (``SECTIONS`` at the end has the names).
3. If it contradicts another option, add that to ``config/rules.py``; if it has no effect without
   another one, add it to ``_needs`` there.
4. Say in ``config/resumed.py`` what becomes of it when a run goes on.
5. ``python -m tools.docs`` writes ``docs/options.md`` anew.

A new section is a dataclass here, a line of ``SECTIONS`` and a field of ``config.Config``.
Nothing here imports torch, so that ``--help`` answers at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


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

    ``low`` and ``high`` are inclusive bounds, ``above`` and ``below`` exclusive ones, of each
    element where the option is a tuple. ``length`` is the least and greatest number of elements.
    ``aliases`` are further names of it. A ``transient`` option is about this run and not part of
    the recipe: the saved config leaves it out.
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
        "", "folder that the run is written to (default: output/MODEL-DATASET)", transient=True
    )
    resume: str = option(
        "",
        "checkpoint file or URL to continue from, or 'auto': the newest good one in --output-dir",
        transient=True,
    )
    start_epoch: int = option(
        0,
        "count that many epochs as done; with --resume, instead of the checkpoint's count",
        low=0,
        transient=True,
    )
    eval: bool = option(False, "evaluate the model of --resume and exit", transient=True)
    epochs: int = option(300, "number of epochs", low=1)
    stop_at_epoch: int | None = option(
        None,
        "stop once that many epochs are done in all; --resume continues later",
        low=1,
        transient=True,
    )
    val_interval: int = option(
        1, "epochs between validations; the last epoch always ends with one", low=1
    )
    stop_after: float | None = option(
        None,
        "stop and save after that many hours of this session, where a machine ends it later; "
        "--resume continues",
        above=0,
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

    model: str = option(
        "deit_base_patch16_224",
        "name: deit_small, cait_S24_224, any timm model, torchvision/NAME, "
        "transformers/NAME_OR_FOLDER …",
    )
    model_kwargs: tuple[str, ...] = option(
        (), "NAME=VALUE …: arguments that the model is built with, e.g. depth=4 qkv_bias=false"
    )
    global_pool: str = option(
        "", "how features of all places become one vector: avg, token, max … (default: the model's)"
    )
    pretrained: bool = option(False, "start from the model's published weights")
    finetune: str = option(
        "", "checkpoint file or https URL to start from, matched by name and shape"
    )
    allow_partial: bool = option(
        False, "--finetune: go on where parts of the model or the checkpoint are left over"
    )
    input_size: int | tuple[int, ...] = option(
        224,
        "side of the images that the model sees, or their height and width, pixels (with weights: "
        "theirs)",
        low=1,
        high=8192,
        length=(1, 2),
    )
    train_sizes: tuple[str, ...] = option(
        (),
        "SIZE:EPOCHS …, train at that size once so many epochs are done, e.g. 128:0 160:30 224:60; "
        "evaluation stays at --input-size",
    )
    in_chans: int = option(
        3,
        "channels of the images: 3 colours, 1 grey, or the bands of TIFF, NPY and PNG files (with "
        "weights: theirs)",
        low=1,
        high=1024,
    )

    # Regularisation.
    drop: float = option(0.0, "dropout rate", low=0, below=1)
    drop_path: float = option(0.1, "stochastic depth rate", low=0, below=1)
    drop_block: float | None = option(None, "DropBlock rate (CNNs)", low=0, below=1)
    head_init_scale: float | None = option(
        None, "factor of the values that the classifier head starts with", low=0
    )
    bn_momentum: float | None = option(
        None,
        "batch norm: share of a batch in the running statistics (default: the model's)",
        above=0,
        high=1,
    )
    bn_eps: float | None = option(
        None, "batch norm: what is added to the variance (default: the model's)", above=0, high=1
    )

    # Which parameters are trained.
    attn_only: bool = option(False, "train only attention, head and position embedding")
    freeze: tuple[str, ...] = option(
        (), "patterns of parameter names to keep fixed, e.g. 'blocks.*' or '*' with --unfreeze-at"
    )
    unfreeze_at: tuple[str, ...] = option(
        (), "EPOCHS:PATTERN, train those parameters once that many epochs are done"
    )
    lora: int = option(
        0,
        "train adapters of that rank in the linear layers, and the head, the rest fixed (LoRA); "
        "0: train the layers themselves",
        low=0,
        high=1024,
    )
    lora_alpha: float | None = option(
        None, "LoRA: the adapters' result counts alpha / rank times (default: the rank)", above=0
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "LoRA: patterns of layer names, e.g. '*.attn.qkv' (default: all linear layers but heads)",
    )

    # How it is computed.
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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``input_size``."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    task: Literal["classification", "multilabel"] = option(
        "classification",
        "one class per image, or any number of them, none included (multilabel; see "
        "docs/multilabel.md)",
    )

    # The data set.
    data_path: str = option(
        "", "folder (or CSV file) of the data set; of wds/ also an https, s3, gs … address"
    )
    data_set: str = option(
        "IMNET",
        "IMNET (folders train/ and val/, one subfolder per class), CIFAR10, CIFAR100 (or CIFAR), "
        "MNIST, FMNIST, INAT, INAT19, CSV, DIGITS (bundled), raw/NAME (pixels of tools.data pack), "
        "or one of timm's readers: wds/NAME, hfds/NAME, tfds/NAME",
    )
    image_root: str = option(
        "", "CSV: folder that its paths are relative to (default: where the file is)"
    )
    image_column: str = option(
        "", "CSV: name of the column of images (default: path, image, filename, image_id, id …)"
    )
    label_column: str = option(
        "", "CSV: name of the column of classes (default: label, class, target, breed …)"
    )
    split_column: str = option(
        "",
        "CSV: name of the column that says train, val or test, or none (default: split, set, "
        "is_train … where its values say so)",
    )
    label_columns: tuple[str, ...] = option(
        (),
        "multilabel CSV: names, or patterns, of the columns of classes, each with 0 or 1 (default: "
        "without a column of labels, all others)",
    )
    label_separator: str = option(
        "",
        "multilabel CSV: what stands between the labels of an image: '|', space, … , or json, or "
        "none: one label each (default: found where it is clear)",
    )
    inat_category: Literal[
        "kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"
    ] = option("name", "iNaturalist: the level that is the class")
    val_fraction: float | None = option(
        None,
        "hold out this share of each class where the data set has no validation part",
        above=0,
        below=1,
    )
    download: bool = option(False, "download the data set if it isn't there (CIFAR, MNIST, FMNIST)")
    class_map: str = option(
        "",
        "--eval: file that says which class of the model each class of the set is, NAME INDEX on "
        "each line, or .json",
        transient=True,
    )
    valid_labels: str = option(
        "",
        "--eval: file with the classes of the model that are looked at alone, an index or name on "
        "each line",
        transient=True,
    )
    real_labels: str = option(
        "",
        "--eval: ImageNet-ReaL's real.json, all right classes of each validation image",
        transient=True,
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error",
        "an image that can't be read: stop and name it, or use another in its place and list it",
    )
    max_image_pixels: int = option(
        178_956_970,
        "an image of more can't be read, but for JPEG, which is read at a part of its size; bounds "
        "the memory of decoding: 12 bytes each",
        low=1,
    )

    # Batches and workers.
    batch_size: int | Literal["auto"] = option(
        64,
        "images per step and process; auto: as many as fit the device, with accumulation up to "
        "--effective-batch",
        low=1,
        aliases=("batch",),
    )
    effective_batch: int = option(
        1024, "images per update of all processes together, with --batch-size auto", low=1
    )
    eval_batch_size: int | None = option(
        None, "images per step and process in evaluation (default: 1.5 × batch-size)", low=1
    )
    num_workers: int | Literal["auto"] = option(
        "auto",
        "workers per process (auto: the machine's cores divided by its processes, at most 10)",
        low=0,
    )
    loader_timeout: float = option(
        300,
        "seconds per batch, after which the image that a worker hangs at is treated as "
        "--on-bad-image says; 0: no limit",
        low=0,
    )
    pin_mem: bool = option(True, "pinned host memory for faster copies to CUDA")

    # Copies that are kept.
    shard_cache: str = option(
        "",
        "folder for copies of remote shards (default: in the system's temporary folder)",
        transient=True,
    )
    shard_cache_gb: float = option(
        50,
        "space for copies of remote shards, 10⁹ bytes; the least recently used are removed",
        above=0,
    )
    cache: Literal["auto", "none", "ram", "device", "disk"] = option(
        "auto",
        "keep decoded images in host memory, on the device (auto: small images of one size; the "
        "pixels are the same) or in a file on disk, where training images are smaller: see "
        "--cache-side",
    )
    cache_side: int | Literal["auto"] = option(
        "auto",
        "--cache disk: short side in pixels that training images are kept with, if theirs is "
        "longer; 0: as they are (auto: 8/7 of the input's, 256 for 224)",
        low=0,
    )
    cache_dir: str = option(
        "",
        "--cache disk: folder of the files, on a local disk (default: decoded-images in ~/.cache)",
        transient=True,
    )
    cache_gb: float = option(
        100,
        "--cache disk: space for the files in that folder, 10⁹ bytes; the least recently used are "
        "removed, what doesn't fit is read from the image files",
        above=0,
    )

    # Order and preprocessing.
    sampler: Literal["shuffle", "balanced", "undersample"] = option(
        "shuffle",
        "order of training: each image once per epoch, drawn with all classes equally likely, or "
        "as many images of each class as the rarest has (others each epoch)",
    )
    eval_crop_ratio: float = option(
        0.875,
        "evaluation: share of the image's side kept; above 1 it gets a border (with weights: "
        "theirs)",
        low=0.01,
        high=2,
    )
    crop_mode: Literal["center", "squash", "border"] = option(
        "center",
        "evaluation: resize the short side and cut out the centre, both sides (squash), or the "
        "long side with a border around the rest (with weights: theirs)",
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"] = option(
        "bicubic", "evaluation: filter of the resizing (with weights: theirs)"
    )
    background: str = option(
        "white",
        "what transparent images are composited on: a colour by name or as #rrggbb, or drop: the "
        "colours under it as they are, as in timm (with weights: theirs)",
    )
    bit_depth: int = option(
        8,
        "bits that are kept of each pixel and channel: 8, or 16, of which 65535 becomes 1 (with "
        "weights: theirs)",
        low=8,
        high=16,
    )
    mean: tuple[float, ...] | None = option(
        None,
        "normalisation mean, one value in 0–1 or one for each channel (default: the model's or "
        "data set's)",
        low=0,
        high=1,
        length=(1, 1024),
    )
    std: tuple[float, ...] | None = option(
        None,
        "normalisation std, one value in 0–1 or one for each channel (default: the model's or "
        "data set's)",
        above=0,
        high=1,
        length=(1, 1024),
    )


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation"""

    # Colours, policies, and where they are computed.
    color_jitter: float | tuple[float, ...] | None = option(
        0.3,
        "jitter of brightness, contrast and saturation: one number for all, or one each, and a "
        "fourth, up to 0.5, of the hue",
        low=0,
        length=(1, 4),
    )
    color_jitter_prob: float = option(
        1.0, "probability that an image's colours are jittered", low=0, high=1
    )
    grayscale_prob: float = option(0.0, "probability of a grey image", low=0, high=1)
    blur_prob: float = option(
        0.0,
        "probability of a Gaussian blur of 0.1 to 2 pixels",
        low=0,
        high=1,
        aliases=("gaussian-blur-prob",),
    )
    aa: str | None = option(
        "rand-m9-mstd0.5-inc1",
        "automatic augmentation: a timm policy (rand-…, augmix-…, original, v0), AutoAugment's for "
        "small images (cifar10, svhn), trivial, or none",
    )
    transform: str = option(
        "", "name of a transform of your own, which a --plugin registers: after crop and flips"
    )
    albumentations: str = option(
        "",
        "YAML file of a pipeline as albumentations.save writes it: after crop and flips",
    )
    train_interpolation: Literal["random", "bilinear", "bicubic"] = option(
        "bicubic", "interpolation when training images are resized"
    )
    jpeg_scaling: Literal["on", "off"] = option(
        "on",
        "decode training images from JPEG files at 1/2, 1/4 or 1/8 where the crop keeps at least "
        "the input's size",
    )
    augment_on: Literal["auto", "cpu", "device"] = option(
        "auto",
        "where training images are augmented: cpu, one by one with Pillow; device, batch by batch "
        "(auto, but for --aa augmix and trivial, --transform and --albumentations)",
    )
    repeated_aug: bool = option(
        True, "repeated augmentation: three differently augmented copies per image"
    )
    train_mode: bool = option(True, "--no-train-mode trains in evaluation mode (no dropout)")
    ThreeAugment: bool = option(
        False,
        "DeiT III's 3-Augment (grey, solarise or blur) in place of --aa and random erasing",
        aliases=("three-augment",),
    )

    # Crops and flips.
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] = option(
        "rrc",
        "random resized crop; or resized with its proportions, of which --scale and --ratio change "
        "some, and cut out in the middle (rkrc) or at a random place (rkrr)",
    )
    src: bool = option(False, "simple random crop in place of the random resized crop")
    scale: tuple[float, ...] = option(
        (0.08, 1.0),
        "random resized crop: least and greatest share of the area",
        above=0,
        high=1,
        length=(2, 2),
    )
    ratio: tuple[float, ...] = option(
        (0.75, 4 / 3),
        "random resized crop: least and greatest width/height",
        above=0,
        length=(2, 2),
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    vflip: float = option(0.0, "probability of a vertical flip", low=0, high=1)
    rotate: float = option(
        0.0, "turn by up to that many degrees, the mean colour around", low=0, high=180
    )
    perspective: float = option(
        0.0,
        "distort the perspective: each corner moves inwards by up to that share of half a side",
        low=0,
        high=0.9,
    )

    # Random erasing.
    reprob: float = option(0.25, "probability of random erasing", low=0, high=1)
    remode: Literal["pixel", "rand", "const"] = option("pixel", "what random erasing fills in")
    recount: int = option(1, "greatest number of erased rectangles per image", low=1)
    resplit: bool = option(
        False,
        "do not erase from the first of the copies of repeated augmentation, or with --aug-splits "
        "from the clean one",
    )
    aug_splits: int = option(
        0,
        "each image that many times in a batch: cropped and flipped alike, the first clean, the "
        "others augmented; 0: once, augmented",
        low=0,
        high=16,
    )

    # Mixup and cutmix.
    mixup: float = option(0.8, "mixup alpha; 0 turns it off", low=0)
    cutmix: float = option(1.0, "cutmix alpha; 0 turns it off", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(
        None,
        "cutmix: least and greatest side as a share of the image (replaces alpha)",
        low=0,
        high=1,
        length=(2, 2),
    )
    mixup_prob: float = option(1.0, "probability that a batch is mixed at all", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0, high=1)
    mixup_mode: Literal["batch", "pair", "elem"] = option(
        "batch", "mix with one random draw per batch, pair or image"
    )
    mixup_off_epoch: int = option(
        0, "mix nothing once that many epochs are done; 0: to the end", low=0
    )


@dataclass(frozen=True)
class LossOptions:
    """Loss and distillation"""

    loss: Literal["auto", "ce", "bce", "focal", "quality-focal", "asl"] = option(
        "auto",
        "auto: cross-entropy, or BCE with --bce-loss, --cosub or --task multilabel; asl: "
        "multilabel's asymmetric loss",
    )
    bce_loss: bool = option(
        False, "DeiT III's binary cross-entropy: every class of a mixed image is a full 1"
    )
    smoothing: float = option(
        0.1, "label smoothing (multilabel: 0 where nobody set it)", low=0, below=1
    )
    focal_gamma: float = option(2.0, "focusing exponent of the focal losses", low=0)
    class_weights: str = option(
        "none",
        "weight of each class in the loss: balanced, by the inverse of its frequency; effective:B, "
        "of its effective number of images with 0 ≤ B < 1; NAME=W,NAME=W, the others 1; or a CSV, "
        "JSON or text file with the weight of each",
    )
    pos_weight: str = option(
        "",
        "multilabel: factor of the loss where a label is there: none, a number, balanced "
        "(negatives / positives of each class), or a file with NAME FACTOR on each line",
    )
    asl_gamma_neg: float = option(4.0, "asl: focusing exponent of absent labels", low=0)
    asl_gamma_pos: float = option(1.0, "asl: focusing exponent of present labels", low=0)
    asl_clip: float = option(
        0.05,
        "asl: margin below which the probability of an absent label costs nothing",
        low=0,
        below=1,
    )
    cosub: bool = option(
        False, "cosub: two submodels drawn by stochastic depth, each the teacher of the other"
    )
    jsd_loss: bool = option(
        False,
        "AugMix's loss of --aug-splits: cross-entropy of the clean images, and the Jensen-Shannon "
        "divergence of all splits",
    )

    # Distillation.
    teacher_model: str = option("regnety_160", "distillation: name of the teacher")
    teacher_path: str = option(
        "", "distillation: checkpoint or https URL of the teacher, or 'timm' for timm's weights"
    )
    distillation_type: Literal["none", "soft", "hard"] = option(
        "none", "target from the teacher: its probabilities (soft) or its class (hard)"
    )
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
    momentum: float = option(0.9, "momentum (SGD and its variants)", low=0, below=1)
    opt_kwargs: tuple[str, ...] = option(
        (), "NAME=VALUE …: further arguments of the optimiser, e.g. nesterov=true amsgrad=true"
    )
    weight_decay: float = option(
        0.05, "weight decay; biases, norms and embeddings have none", low=0
    )
    clip_grad: float | None = option(None, "limit of the gradient; see --clip-mode", above=0)
    clip_mode: Literal["norm", "value", "agc"] = option(
        "norm",
        "limit the global norm, each value, or the norm of each unit relative to its weight (AGC)",
    )

    # Learning rate.
    lr: float = option(5e-4, "learning rate for an effective batch of 512", low=0)
    unscale_lr: bool = option(False, "use --lr as it is, without scaling by effective batch / 512")
    layer_decay: float | None = option(
        None, "learning rate factor from each layer to the one below", above=0, high=1
    )
    head_lr_scale: float = option(1.0, "learning rate factor of the classifier head", above=0)

    # The update.
    accum_steps: int = option(1, "batches whose gradients make one update", low=1)
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
        "number of updates in full precision after a rollback, with the whole learning rate",
        low=0,
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning-rate schedule (stepped every update)"""

    sched: Literal[
        "cosine", "cosine-restarts", "step", "multistep", "plateau", "onecycle", "poly", "constant"
    ] = option("cosine", "schedule, after a linear warm-up")
    lr_noise: tuple[float, ...] | None = option(
        None,
        "share of the epochs from which (to which) the learning rate is noisy",
        low=0,
        high=1,
        length=(1, 2),
    )
    lr_noise_pct: float = option(
        0.67, "greatest noise, as a share of the learning rate", above=0, high=1
    )
    lr_noise_std: float = option(1.0, "std of the noise", low=0)
    warmup_lr: float = option(1e-6, "learning rate of the first step", low=0)
    min_lr: float = option(
        1e-5, "learning rate at the end of cosine, one-cycle and poly, lowest of plateau", low=0
    )
    warmup_epochs: float = option(
        5,
        "length of the warm-up (where nobody set it and it is more than half of --epochs: a fifth "
        "of them)",
        low=0,
    )
    cooldown_epochs: int = option(0, "epochs at the final rate, after --epochs", low=0)

    # Options of single schedules.
    decay_epochs: float = option(30, "step: epochs between decays", above=0)
    decay_milestones: tuple[float, ...] = option((), "multistep: epochs of the decays", above=0)
    decay_rate: float = option(
        0.1, "step, multistep, plateau: factor per decay", above=0, high=1, aliases=("dr",)
    )
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
        1.0, "cosine-restarts: factor of the peak per restart", above=0, high=1
    )
    poly_power: float = option(0.9, "poly: exponent", above=0)


@dataclass(frozen=True)
class EmaOptions:
    """Moving average of the weights"""

    model_ema: bool = option(True, "keep an exponential moving average; it is evaluated too")
    model_ema_decay: float = option(0.99996, "decay per update", low=0, below=1)
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
    keep: int = option(2, "number of newest checkpoints kept, besides the best", low=1)
    best_metric: str = option(
        "test_acc1",
        "log key that decides which checkpoint is best, with or without test_: macro_f1, "
        "balanced_acc, worst_class_acc … (…loss: lower is better; multilabel: test_map where "
        "nobody set it)",
        aliases=("monitor",),
    )
    early_stop: int = option(
        0, "stop after this many epochs without progress of --best-metric; 0: never", low=0
    )
    early_stop_delta: float = option(0.0, "smallest change that is progress", low=0)


@dataclass(frozen=True)
class LogOptions:
    """Logs"""

    print_epoch: int = option(1, "epochs between printed summaries", low=1)
    log_interval: int = option(50, "updates between reads of the loss from the device", low=1)
    tensorboard: bool = option(True, "write TensorBoard files")
    tb_histograms: bool = option(
        False, "TensorBoard: histograms of weights and gradients per epoch"
    )
    tb_graph: bool = option(False, "TensorBoard: graph of the model")
    log_to: tuple[str, ...] = option(
        (),
        "trackers that get what TensorBoard gets of options, steps and epochs: wandb, mlflow, "
        "trackio, each a package to install",
    )
    log_project: str = option(
        "image-classification", "--log-to: the project there, for MLflow the experiment"
    )
    log_name: str = option("", "--log-to: name of the run there (default: that of its folder)")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info",
        "least severe messages on the console and in run.log; debug: those of libraries too",
    )
    profile: int = option(
        0,
        "trace that many updates of an epoch with torch.profiler, once warm, into profile/ of the "
        "run's folder; 0: none",
        low=0,
        transient=True,
    )


@dataclass(frozen=True)
class DistOptions:
    """Several processes"""

    distributed: bool = option(False, "require several processes: an error without a launcher")
    world_size: int = option(1, "number of processes, for a --dist-url that isn't env://", low=1)
    dist_url: str = option(
        "env://", "where the processes meet: env://, file://PATH or tcp://HOST:PORT"
    )
    dist_eval: bool = option(
        True, "split evaluation over the processes; the result is the same to the last digit"
    )
    dist_timeout: int = option(600, "seconds after which a silent process is given up", low=1)
    dist_start_timeout: int = option(
        50, "seconds in which all processes must have started", low=1, transient=True
    )
    fsdp: bool = option(
        False,
        "shard weights, gradients and optimiser over the processes (FSDP2), for models that don't "
        "fit one card; checkpoints are folders, see docs/cluster.md",
    )
    sync_bn: bool = option(False, "batch norm over the images of all processes together")


SECTIONS: dict[str, type] = {
    "run": RunOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "augment": AugmentOptions,
    "loss": LossOptions,
    "optim": OptimOptions,
    "schedule": ScheduleOptions,
    "ema": EmaOptions,
    "save": SaveOptions,
    "log": LogOptions,
    "dist": DistOptions,
}
"""The sections by the name of their field in ``config.Config``."""
