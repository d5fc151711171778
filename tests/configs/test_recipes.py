"""The recipes in configs/: they parse, say how to run them, and hold the published figures."""

import re
import shlex
from pathlib import Path

import pytest
from timm.optim import list_optimizers

import config
import models
from training.plugins import import_plugins

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def head(name: str) -> str:
    """The comment block that a recipe opens with, as one text."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[1:] for line in lines[:end])


def command(name: str) -> list[str]:
    """The words of the command in that block."""
    text = head(name).replace("\\\n", " ")
    found = re.search(
        rf"(?:python|torchrun)\b.*main\.py --config configs/{name}\.yaml[^)\n]*", text
    )
    assert found, f"{name}.yaml doesn't say how to run it"
    return shlex.split(found[0])


def load(name: str) -> config.Config:
    return config.load(["--config", str(CONFIGS / f"{name}.yaml")])


def gpus(name: str) -> int:
    words = command(name)
    return int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1


@pytest.mark.parametrize("name", NAMES)
def test_recipe_parses_and_its_command_too(name):
    words = command(name)
    argv = words[words.index("main.py") + 1 :]
    argv[argv.index("--config") + 1] = str(CONFIGS / f"{name}.yaml")
    from_command = config.load(argv)
    assert from_command.data.data_path or from_command.data.data_set == "DIGITS"
    assert from_command.recipe().items() >= {("epochs", load(name).run.epochs)}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_names_things_that_exist(name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    recipe = load(name)
    import_plugins(recipe.run.plugin)
    assert models.resolve_name(recipe.model.model)
    assert models.resolve_name(recipe.loss.teacher_model)
    assert recipe.optim.opt in list_optimizers()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "quickstart"])
def test_opening_tells_hardware_source_and_whether_it_was_measured(name):
    text = head(name)
    for word in ("Hardware: ", "Published: "):
        assert word in text
    assert ("Measured here: " in text) != ("Not measured here" in text)
    assert all(len(line) <= 100 for line in text.splitlines())


# DeiT, arXiv 2012.12877, table 9, and the commands of the deit repository.
DEIT = {
    "epochs": 300,
    "opt": "adamw",
    "lr": 5e-4,
    "unscale_lr": False,
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "smoothing": 0.1,
    "drop": 0.0,
    "drop_path": 0.1,
    "repeated_aug": True,
    "clip_grad": None,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup_prob": 1.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "reprob": 0.25,
    "model_ema": True,
    "input_size": 224,
    "batch": 1024,
}
DISTILLED = {
    "distillation_type": "hard",
    "distillation_alpha": 0.5,
    "teacher_model": "regnety_160",
    "teacher_path": "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth",
}
FINE_384 = {
    "input_size": 384,
    "epochs": 30,
    "lr": 5e-6,
    "min_lr": 5e-6,
    "weight_decay": 1e-8,
    "batch": 512,
}
# CaiT, arXiv 2103.17239: DeiT's but for these; evaluation at crop ratio 1.
CAIT = DEIT | {"epochs": 400, "eval_crop_ratio": 1.0}
# DeiT III, arXiv 2204.07118, and the commands of the deit repository.
DEIT3 = {
    "epochs": 800,
    "opt": "lamb",
    "lr": 4e-3,
    "unscale_lr": True,
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "smoothing": 0.0,
    "drop_path": 0.05,
    "repeated_aug": True,
    "ThreeAugment": True,
    "color_jitter": 0.3,
    "src": False,
    "reprob": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "bce_loss": True,
    "clip_grad": None,
    "input_size": 224,
    "eval_crop_ratio": 1.0,
    "batch": 2048,
}
# "ResNet strikes back", arXiv 2110.00476, table 2.
RSB = {
    "model": "resnet50",
    "opt": "lamb",
    "unscale_lr": True,
    "sched": "cosine",
    "warmup_epochs": 5,
    "bce_loss": True,
    "cutmix": 1.0,
    "clip_grad": None,
    "eval_crop_ratio": 0.95,
    "drop": 0.0,
    "reprob": 0.0,
    "smoothing": 0.0,
    "batch": 2048,
}
# Small sets of one's own: no paper's setting, but these three share what is not about unfreezing.
FINE = {
    "model": "deit_small_patch16_224",
    "pretrained": True,
    "opt": "adamw",
    "unscale_lr": True,
    "batch": 64,
    "repeated_aug": False,
    "smoothing": 0.1,
    "sched": "cosine",
}
# The worked example: teacher and students differ by model, images and teacher alone.
FMNIST = {"input_size": 28, "plugin": ["examples/fashion.py"], "opt": "muon"}

FIGURES = {
    "deit_tiny": DEIT | {"model": "deit_tiny_patch16_224"},
    "deit_small": DEIT | {"model": "deit_small_patch16_224"},
    "deit_base": DEIT | {"model": "deit_base_patch16_224"},
    "deit_tiny_distilled": DEIT | DISTILLED | {"model": "deit_tiny_distilled_patch16_224"},
    "deit_small_distilled": DEIT | DISTILLED | {"model": "deit_small_distilled_patch16_224"},
    "deit_base_distilled": DEIT | DISTILLED | {"model": "deit_base_distilled_patch16_224"},
    "deit_base_384": DEIT
    | FINE_384
    | {
        "model": "deit_base_patch16_384",
        "finetune": "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
    },
    "deit_base_distilled_384": DEIT
    | FINE_384
    | DISTILLED
    | {
        "model": "deit_base_distilled_patch16_384",
        "finetune": "https://dl.fbaipublicfiles.com/deit/"
        "deit_base_distilled_patch16_224-df68dfff.pth",
    },
    "deit3_small": DEIT3 | {"model": "deit3_small_patch16_224"},
    "deit3_base": DEIT3
    | {"model": "deit3_base_patch16_224", "input_size": 192, "lr": 3e-3, "drop_path": 0.2},
    "deit3_base_224": {
        "model": "deit3_base_patch16_224",
        "input_size": 224,
        "epochs": 20,
        "opt": "adamw",
        "lr": 1e-5,
        "unscale_lr": True,
        "weight_decay": 0.1,
        "smoothing": 0.1,
        "drop_path": 0.2,
        "repeated_aug": False,
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.0,
        "bce_loss": False,
        "batch": 512,
    },
    "cait_xxs24_224": CAIT | {"model": "cait_xxs24_224", "drop_path": 0.05},
    "cait_xxs24_224_distilled": CAIT | DISTILLED | {"model": "cait_xxs24_224", "drop_path": 0.05},
    "cait_s24_224": CAIT | {"model": "cait_s24_224", "drop_path": 0.1},
    "cait_s24_224_distilled": CAIT | DISTILLED | {"model": "cait_s24_224", "drop_path": 0.1},
    # The author's fine-tuning of M48, deit repository, issue 108, with the drop path of S24.
    "cait_s24_384": CAIT
    | DISTILLED
    | {
        "model": "cait_s24_384",
        "input_size": 384,
        "epochs": 60,
        "lr": 5e-6,
        "unscale_lr": True,
        "min_lr": 5e-6,
        "drop_path": 0.1,
        "batch": 256,
        "finetune": "https://dl.fbaipublicfiles.com/deit/S24_224.pth",
    },
    "resnet50_a1": RSB
    | {
        "epochs": 600,
        "lr": 5e-3,
        "weight_decay": 0.01,
        "repeated_aug": True,
        "mixup": 0.2,
        "aa": "rand-m7-mstd0.5-inc1",
        "drop_path": 0.05,
        "input_size": 224,
    },
    "resnet50_a2": RSB
    | {
        "epochs": 300,
        "lr": 5e-3,
        "weight_decay": 0.02,
        "repeated_aug": True,
        "mixup": 0.1,
        "aa": "rand-m7-mstd0.5-inc1",
        "drop_path": 0.05,
        "input_size": 224,
    },
    "resnet50_a3": RSB
    | {
        "epochs": 100,
        "lr": 8e-3,
        "weight_decay": 0.02,
        "repeated_aug": False,
        "mixup": 0.1,
        "aa": "rand-m6-mstd0.5-inc1",
        "drop_path": 0.0,
        "input_size": 160,
    },
    "cifar10_resnet18": {
        "model": "resnet18_cifar",
        "data_set": "CIFAR10",
        "input_size": 32,
        "opt": "sgd",
        "momentum": 0.9,
        "lr": 0.1,
        "unscale_lr": True,
        "weight_decay": 5e-4,
        "epochs": 200,
        "batch": 128,
    },
    "transfer_resnet50": {
        "model": "resnet50",
        "pretrained": True,
        "freeze": ["*"],
        "unfreeze_at": ["0:fc", "3:*"],
    },
    "finetune_frozen": FINE
    | {
        "freeze": ["*"],
        "unfreeze_at": ["0:head"],
        "lr": 1e-3,
        "epochs": 30,
        "mixup": 0.0,
    },
    "finetune_gradual": FINE
    | {
        "freeze": ["*"],
        "lr": 1e-4,
        "head_lr_scale": 10,
        "epochs": 40,
        "unfreeze_at": ["0:head", "0:norm", *(f"5:blocks.{i}" for i in range(8, 12)), "10:*"],
    },
    # Layer-wise decay of BEiT and MAE for base and smaller models: 0.65 to 0.75.
    "finetune_layerwise": FINE | {"layer_decay": 0.75, "freeze": [], "lr": 5e-4, "epochs": 50},
    "fmnist_teacher": FMNIST | {"model": "micro_resnet", "data_set": "FMNIST", "epochs": 1},
    "fashion_scenes": {
        "task": "multilabel",
        "input_size": 56,
        "best_metric": "test_map",
        "smoothing": 0.0,
        "label_separator": "|",
    },
    "fmnist_student": FMNIST | {"model": "micro_deit_distilled", "distillation_type": "none"},
    "fmnist_student_distilled": FMNIST
    | {
        "model": "micro_deit_distilled",
        "distillation_type": "hard",
        "teacher_model": "micro_resnet",
        "teacher_path": "output/fmnist_teacher/best.pth",
    },
    "optimal31_seresnext50": {
        "model": "seresnext50_32x4d",
        "opt": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "sched": "cosine",
        "lr": 0.06,
        "epochs": 240,
        "batch": 64,
        "drop": 0.01,
        "drop_path": 0.1,
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "mixup": 0.8,
        "cutmix": 1.0,
        "reprob": 0.25,
        "color_jitter": 0.4,
        "smoothing": 0.1,
        "train_interpolation": "bicubic",
        "seed": 0,
    },
}


@pytest.mark.parametrize("name, figures", FIGURES.items())
def test_recipe_holds_the_published_figures(name, figures):
    recipe = load(name)
    batch = recipe.data.batch_size * recipe.optim.accum_steps * gpus(name)
    held = recipe.recipe() | {"batch": batch}
    assert {key: held[key] for key in figures} == figures


def test_every_recipe_has_its_figures_here():
    assert set(NAMES) == set(FIGURES) | {"quickstart"}
