"""What one process of a group has that the others haven't, and the line that must follow."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

LIST = "list.csv"
_OWN = """
import augmentation.own
@augmentation.own.register_transform("own")
def own(image):
    return image.point(lambda level: level // {})
"""
_PIPELINE = """__version__: 2.0.8
transform:
  __class_fullname__: Compose
  additional_targets: {{}}
  bbox_params: null
  keypoint_params: null
  is_check_shapes: true
  p: 1.0
  transforms:
  - __class_fullname__: HorizontalFlip
    p: {}
"""
_WEIGHTS = "class0 1\nclass1 1\nclass2 2\n"
# By what stands for a file in an option: its name, and its content usually and for the odd one.
FILES = {
    "OWN": ("own.py", (_OWN.format(1), _OWN.format(2))),
    "WEIGHTS_OF_CLASSES": ("w.txt", (_WEIGHTS, _WEIGHTS.replace("2\n", "3\n"))),
    "PIPELINE": ("p.yaml", (_PIPELINE.format(0.5), _PIPELINE.format(0.6))),
    "MAP": ("m.txt", ("class0 0\nclass1 1\nclass2 2\n", "class0 1\nclass1 0\nclass2 2\n")),
    "VALID": ("v.txt", ("0\n1\n2\n", "0\n2\n1\n")),
    "REAL": ("r.json", ("[[0], [0], [1], [1], [2], [2]]", "[[0], [0], [1], [1], [2], [2, 1]]")),
}


@dataclass(frozen=True)
class Case:
    """What one rank has that the others haven't, and the line that must follow.

    In ``said``, ODD stands for the number of that rank.
    """

    name: str
    said: str
    options: tuple[str, ...] = ()
    """Of the odd rank alone."""
    shared: tuple[str, ...] = ()
    """Of all."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the odd rank alone."""
    images: Callable[[Path], None] | None = None
    """Changes the odd rank's copy of the images."""
    data: str = "images"
    """Of the ground: folders of classes, or "bands", a list of several labels."""
    codes: tuple[int, ...] = (2,)


def _rename_class(images: Path) -> None:
    for part in ("train", "val"):
        (images / part / "class1").rename(images / part / "class1b")


def _lose_file(images: Path) -> None:
    (images / "train" / "class1" / "3.png").unlink()


def _rename_file(images: Path) -> None:
    (images / "val" / "class1" / "1.png").rename(images / "val" / "class1" / "7.png")


def _move_label(images: Path) -> None:
    (images / "train" / "class1" / "3.png").rename(images / "train" / "class2" / "x.png")
    (images / "train" / "class2" / "5.png").rename(images / "train" / "class1" / "y.png")


def _other_content(images: Path) -> None:
    file = images / "train" / "class0" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")


def _lose_all(images: Path) -> None:
    shutil.rmtree(images)


def _other_label(bands: Path) -> None:
    file = bands / LIST
    lines = file.read_text().splitlines()
    path, _, labels = lines[7].partition(",")
    lines[7] = f"{path},{'wet' if labels != 'wet' else 'dry'}"
    file.write_text("\n".join(lines) + "\n")


def _other_order(bands: Path) -> None:
    file = bands / LIST
    first, *lines = file.read_text().splitlines()
    lines[4:6] = [lines[5], lines[4]]
    file.write_text("\n".join([first, *lines]) + "\n")


def _nothing(images: Path) -> None:
    """Another folder of the same images."""


def _option(flag: str, other: str, said: str, usual: str, *shared: str) -> Case:
    options = (flag, other) if other else (flag,)
    said = rf"rank ODD \(host .*\) has {said}, ranks? [\d, ]+\(host .*\) ha(s|ve) {usual}"
    return Case(" ".join((*shared, *options)), said, options, shared)


def _file_option(flag: str, kind: str, *shared: str) -> Case:
    """An option that names a file, which has another content."""
    said = rf"rank ODD \(host .*\) has {flag} .*content [0-9a-f]+.*content [0-9a-f]+"
    return Case(f"content of {flag}", said, (flag, f"OTHER_{kind}"), (*shared, flag, kind))


_SEVERAL = ("--task", "multilabel", "--data-set", "CSV", "--in-chans", "4", "--bit-depth", "16")
_SEVERAL += ("--val-fraction", "0.25")
DISAGREEMENTS = (
    _option("--lr", "0.02", "--lr 0.02", "--lr 0.01"),
    _option("--seed", "4", "--seed 4", "--seed 3"),
    _option("--opt", "sgd", "--opt sgd", "--opt adamw"),
    _option("--amp", "bf16", "--amp bfloat16", "--amp off"),
    _option("--batch-size", "3", "--batch-size 3", "--batch-size 2"),
    _option("--epochs", "3", "--epochs 3", "--epochs 2"),
    _option("--model", "modern_lenet", "--model modern_lenet", "--model deit_nano"),
    _option("--no-model-ema", "", "--model-ema False", "--model-ema True"),
    _option("--accum-steps", "2", "--accum-steps 2", "--accum-steps 1"),
    _option("--resume", "auto", "--resume auto", "--resume none"),
    _option("--eval", "", "--eval True", "--eval False", "--resume", "auto"),
    _option("--fsdp", "", "--fsdp True", "--fsdp False"),
    _option("--plugin", "PLUGIN", r"--plugin other.py \(content .*\)", "--plugin none"),
    _option("--no-dist-eval", "", "--dist-eval False", "--dist-eval True"),
    Case(
        "class folders",
        r"rank ODD .*has class 1 'class1b', ranks? [\d, ]+\(.*ha(s|ve) class 1 'class1'",
        images=_rename_class,
    ),
    Case("one file fewer", r"rank ODD .*has 23 training images.*class1/3\.png", images=_lose_file),
    Case("validation file", r"the first validation image .*rank ODD .*7\.png", images=_rename_file),
    Case("labels moved", r"first training image .*rank ODD .*of class", images=_move_label),
    Case("content of a file", r"rank ODD .*class0/0\.png of \d+ bytes", images=_other_content),
    Case(
        "no data",
        "error: (process ODD failed: )?--data-path: .* does not exist",
        images=_lose_all,
    ),
    Case(
        "other files in an evaluation",
        r"the first validation image .*rank ODD",
        shared=("--eval", "--finetune", "WEIGHTS"),
        images=_rename_file,
    ),
    Case(
        "starting weights",
        r"start from other weights: rank ODD .*layer",
        ("--finetune", "OTHER_WEIGHTS"),
        ("--finetune", "WEIGHTS"),
    ),
    Case(
        "labels of an image that has several",
        r"training image that differs: rank ODD .*\.npy with (labels? |no label)",
        shared=_SEVERAL,
        images=_other_label,
        data="bands",
    ),
    Case(
        "a list in another order",
        r"the first (training|validation) image .*rank ODD .*\.npy",
        shared=_SEVERAL,
        images=_other_order,
        data="bands",
    ),
    replace(_option("--in-chans", "3", "--in-chans 3", "--in-chans 4", *_SEVERAL), data="bands"),
    replace(
        _option("--bit-depth", "8", "--bit-depth 8", "--bit-depth 16", *_SEVERAL), data="bands"
    ),
    _option("--lora", "4", "--lora 4", "--lora 2", "--lora", "2"),
    _option("--lora-alpha", "3", "--lora-alpha 3", "--lora-alpha none", "--lora", "2"),
    _option(
        *("--train-sizes", "8:0", "--train-sizes 8:0", "--train-sizes 8:0 12:1"),
        *("--input-size", "12", "--train-sizes", "8:0", "12:1"),
    ),
    _file_option("--plugin", "OWN", "--transform", "own"),
    _file_option("--class-weights", "WEIGHTS_OF_CLASSES"),
    _file_option("--albumentations", "PIPELINE"),
    *(
        _file_option(flag, kind, "--eval", "--finetune", "WEIGHTS")
        for flag, kind in (
            ("--class-map", "MAP"),
            ("--valid-labels", "VALID"),
            ("--real-labels", "REAL"),
        )
    ),
    Case(
        "WORLD_SIZE",
        r"is one of \d processes|number 2 did not come|can't meet",
        environment={"WORLD_SIZE": "4"},
    ),
    Case("another root, the same images", "", images=_nothing, codes=(0,)),
)
ENVIRONMENTS = tuple(
    Case(f"{name}={value!r}", rf"--\S+: .*{name}", environment={name: value}, codes=(2, 1))
    for name, value in (
        *(("LOCAL_RANK", "x"), ("LOCAL_RANK", "9"), ("RANK", ""), ("RANK", "-1"), ("RANK", "7")),
        *(("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("LOCAL_WORLD_SIZE", "0")),
        *(("MASTER_PORT", "99999"), ("MASTER_PORT", "0"), ("MASTER_PORT", "abc")),
        *(("MASTER_ADDR", ""), ("TORCHELASTIC_MAX_RESTARTS", "many")),
    )
)
